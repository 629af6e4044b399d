//! Programs in other languages, which call `requeuest.fire`.
//!
//! They need packages, which `.ci/run` installs. It names the program and its packages in
//! `REQUEUEST_PYTHON`, the interpreter of an environment with psycopg, and `NODE_PATH`.

use std::path::Path;
use std::process::Command;

use crate::Setting;

/// Runs a script that prints ids and an error, and checks what it did.
async fn runs(program: &str, script: &str) {
    let setting = Setting::new().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let output = Command::new(program)
        .arg(script)
        .args([setting.url(), setting.receiver.url()])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let printed = String::from_utf8(output.stdout).unwrap();
    let parts: Vec<&str> = printed.split('"').skip(1).step_by(2).collect();
    let [committed, rolled_back, state, field, hint] = parts[..] else {
        panic!("{printed}");
    };
    assert_eq!((state, field), ("22023", "url"), "{printed}");
    assert!(hint.starts_with("Give a URL such as "), "{hint}");
    let [committed, rolled_back] = [committed, rolled_back].map(|id| id.parse().unwrap());
    setting.assert_only(committed, rolled_back).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs psycopg, which .ci/run installs"]
async fn a_commit_of_psycopg_sends_and_a_rollback_does_not() {
    let python = std::env::var("REQUEUEST_PYTHON").expect("REQUEUEST_PYTHON names a program");
    runs(&python, "psycopg/orders.py").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs node-postgres, which .ci/run installs"]
async fn a_commit_of_node_postgres_sends_and_a_rollback_does_not() {
    runs("node", "node/orders.js").await;
}
