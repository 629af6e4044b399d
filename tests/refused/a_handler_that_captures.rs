//~ is not an async function of `(&mut PgConnection, &Outcome)`

fn main() {
    let mut count = 0;
    let _ = requeuest::outcome_fn(
        async |_: &mut sqlx::PgConnection, _: &requeuest::Outcome| {
            count += 1;
            Ok::<_, sqlx::Error>(())
        },
    );
}
