//! The guide shows the code that runs here.

/// A text without white space, which differs where a line is indented or broken.
fn squeezed(text: &str) -> String {
    text.split_whitespace().collect()
}

#[test]
fn the_snippets_of_the_guide_are_the_code_of_these_tests() {
    let guide = include_str!("../../../docs/guide.md");
    let (_, section) = guide
        .split_once("\n### Other drivers and languages\n")
        .unwrap();
    let (section, _) = section.split_once("\n### ").unwrap();
    let tested = [
        include_str!("diesel_async.rs"),
        include_str!("../node/orders.js"),
        include_str!("../psycopg/orders.py"),
        include_str!("sea_orm.rs"),
        include_str!("sqlx.rs"),
        include_str!("tokio_postgres.rs"),
    ]
    .map(squeezed);
    let blocks = section.split("```").skip(1).step_by(2);
    let mut checked = 0;
    for block in blocks {
        let (language, code) = block.split_once('\n').unwrap();
        if !["rust,ignore", "python", "js"].contains(&language) {
            continue;
        }
        checked += 1;
        let code = squeezed(code);
        assert!(tested.iter().any(|it| it.contains(&code)), "{block}");
    }
    assert_eq!(checked, 6);
}
