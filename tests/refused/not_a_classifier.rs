//~ `u32` is not a classifier

fn main() {
    let _: fn(sqlx::PgPool) = |pool| {
        let _ = requeuest::Durable::builder(pool).classify(5_u32);
    };
}
