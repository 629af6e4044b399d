//~ `u32` is not a hook of attempts

fn main() {
    let _: fn(sqlx::PgPool) = |pool| {
        let _ = requeuest::Durable::builder(pool).on_attempt(5_u32);
    };
}
