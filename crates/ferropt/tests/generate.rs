//! `ferropt generate` from a run that this test trains.

mod lab;

use lab::{Lab, ferropt, text};
use std::io::Write;
use std::process::Stdio;

#[test]
fn generates_what_it_learnt() {
    let lab = Lab::new();
    lab.train(&lab.config("run", 150), &["model.dropout=0", "model.attention_dropout=0"]);
    let run = lab.path("run").display().to_string();
    let generate = |args: &[&str]| {
        let out = ferropt().args(["generate", "--model", &run]).args(args).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        String::from_utf8(out.stdout).unwrap()
    };
    let greedy = generate(&["--greedy", "--max-tokens", "40", "The cat "]);
    assert_eq!(greedy, generate(&["--greedy", "--max-tokens", "40", "--threads", "1", "The cat "]));
    assert!(greedy.starts_with("The cat "), "{greedy}");
    assert!(
        greedy.contains(" the ") || greedy.contains(" a ") || greedy.contains("."),
        "learnt nothing: {greedy}"
    );

    let sampled =
        |seed: &str| generate(&["--seed", seed, "--temperature", "1.5", "--max-tokens", "40", "A "]);
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
    assert_eq!(generate(&["--top-k", "1", "--max-tokens", "40", "The cat "]), greedy, "top-k 1 is greedy");

    let mut child = ferropt()
        .args(["generate", "--model", &run, "--greedy", "--max-tokens", "40"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"The cat ").unwrap();
    assert_eq!(
        String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap(),
        greedy,
        "from standard input"
    );
}

#[test]
fn refusals_say_what_to_do() {
    let lab = Lab::new();
    lab.train(&lab.config("run", 5), &[]);
    let run = lab.path("run").display().to_string();
    let long = "word ".repeat(50);
    for (args, parts) in [
        (&["--model", "/nowhere", "x"][..], &["/nowhere"][..]),
        (&["--model", &run, "--checkpoint", "77", "x"], &["77"]),
        (&["--model", &run, "--top-p", "1.5", "x"], &["top-p", "1.5"]),
        (&["--model", &run, "--temperature", "-1", "x"], &["temperature", "-1"]),
        (&["--model", &run, &long], &["64"]),
    ] {
        let out = ferropt().arg("generate").args(args).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success(), "{args:?}");
        assert!(parts.iter().all(|p| said.contains(p)), "{args:?} should mention {parts:?}: {said}");
    }
}
