//~ `requeuest::reqwest::Client` is not an HTTP client that requeuest can send with

fn transport(pool: sqlx::PgPool) {
    let _ = requeuest::Durable::builder(pool).transport(requeuest::reqwest::Client::new());
}

fn main() {
    let _: fn(sqlx::PgPool) = transport;
}
