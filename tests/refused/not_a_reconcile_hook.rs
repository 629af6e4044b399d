//~ `u32` is not a reconcile hook

fn main() {
    let _: fn(sqlx::PgPool) = |pool| {
        let _ = requeuest::Durable::builder(pool).reconcile(5_u32);
    };
}
