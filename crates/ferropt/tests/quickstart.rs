//! `ferropt quickstart` as a user meets it, in seconds.

mod lab;

use lab::{Lab, ferropt, text};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Quick starts fit their length to the speed that they measure, so they go one at a time, with a thread each: that does
/// not depend on what else the machine does as much.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder with real prose and code: this workspace's sources.
fn corpus() -> Lab {
    let lab = Lab::new();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/src");
    let list = |folder: &str| std::fs::read_dir(sources.join(folder)).unwrap().map(|f| f.unwrap().path());
    let mut files: Vec<_> = list("config").chain(list("telemetry")).filter(|path| path.is_file()).collect();
    files.sort();
    let all: String = files.iter().map(|f| std::fs::read_to_string(f).unwrap()).collect();
    std::fs::write(lab.path("sources.txt"), all).unwrap();
    lab
}

fn quickstart(lab: &Lab, args: &[&str]) -> Command {
    let mut command = ferropt();
    command
        .arg("quickstart")
        .arg("--dir")
        .arg(lab.path("quick"))
        .arg("--text")
        .arg(lab.path("sources.txt"))
        .args(args);
    command
}

fn succeeds(mut command: Command) -> Output {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    out
}

#[test]
fn learns_reports_and_can_be_used_at_once() {
    let (lab, _alone) = (corpus(), alone());
    let out = text(&succeeds(quickstart(&lab, &["--minutes", "0.1", "--seed", "3"])));
    let losses = lab.metric("quick", "loss");
    assert!(losses.len() >= 10, "{losses:?}");
    assert!(losses[losses.len() - 1].1 < 0.95 * losses[0].1, "the loss falls: {losses:?}");
    for part in ["sources.txt", "held out", "tokens/s", "Before training", "After training", "Try next"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let read = |name: &str| std::fs::read_to_string(lab.path("quick").join(name)).unwrap();
    assert!(read("report.md").contains("loss.svg") && read("loss.svg").contains("validation, held-out"));
    let report: serde_json::Value = serde_json::from_str(&read("report.json")).unwrap();
    let results = &report["results"];
    assert_eq!(results["steps"], report["sizes"]["steps"]);
    assert!(results["bits_per_byte"].as_f64().unwrap() < 8.0, "{report}");
    assert_ne!(report["before"], report["after"]);

    // Two of the three commands that it prints; the third is itself.
    let mut generate = ferropt();
    generate.args(["generate", "--max-tokens", "5", "--model"]).arg(lab.path("quick")).arg("The");
    assert!(text(&succeeds(generate)).starts_with("The"));
    let steps = report["sizes"]["steps"].as_u64().unwrap();
    let mut longer = ferropt();
    longer
        .arg("train")
        .arg(lab.path("quick/quickstart.toml"))
        .arg("--set")
        .arg(format!("run.steps={}", steps + 2));
    succeeds(longer);
    assert_eq!(lab.metric("quick", "loss").last().unwrap().0, steps + 2);
}

#[test]
fn the_same_command_again_goes_on_or_says_that_it_is_complete() {
    let (lab, _alone) = (corpus(), alone());
    let child = quickstart(&lab, &["--minutes", "0.2"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::fs::read_to_string(lab.path("quick/metrics.jsonl")).unwrap_or_default().lines().count() < 2 {
        assert!(Instant::now() < deadline, "no steps within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && text(&out).contains("same command"), "{}", text(&out));
    let stopped = lab.metric("quick", "loss").last().unwrap().0;

    let again = text(&succeeds(quickstart(&lab, &["--minutes", "0.5"])));
    assert!(again.contains("resuming") && again.contains("After training"), "{again}");
    assert!(lab.metric("quick", "loss").last().unwrap().0 > stopped);
    let report = std::fs::read(lab.path("quick/report.json")).unwrap();
    let complete = text(&succeeds(quickstart(&lab, &["--minutes", "0.5"])));
    assert!(complete.contains("complete already") && complete.contains("After training"), "{complete}");
    assert_eq!(std::fs::read(lab.path("quick/report.json")).unwrap(), report);

    // As a stop in the last validation leaves it.
    let (metrics, file) = (lab.path("quick/metrics.jsonl"), lab.path("quick/report.json"));
    let lines = std::fs::read_to_string(&metrics).unwrap();
    let lines: Vec<&str> = lines.lines().collect();
    let (last, rest) = lines.split_last().unwrap();
    assert!(last.contains("validation"), "{last}");
    std::fs::write(&metrics, rest.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let whole: serde_json::Value = serde_json::from_slice(&report).unwrap();
    let mut cut = whole.clone();
    cut["results"]["held_out_loss"] = serde_json::Value::Null;
    std::fs::write(&file, cut.to_string()).unwrap();
    succeeds(quickstart(&lab, &["--minutes", "0.5"]));
    let now: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(now["results"]["held_out_loss"], whole["results"]["held_out_loss"]);
}

#[test]
fn refusals_say_what_to_do() {
    let lab = Lab::new();
    let refused = |command: &mut Command| {
        let out = command.output().unwrap();
        assert!(!out.status.success(), "{}", text(&out));
        assert!(!lab.path("quick/quickstart.toml").exists());
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let dir = || {
        let mut command = ferropt();
        command.arg("quickstart").arg("--dir").arg(lab.path("quick"));
        command
    };
    let said = refused(dir().args(["--minutes", "-2"]));
    assert!(said.contains("--minutes -2"), "{said}");
    let said = refused(dir().arg("--text").arg(lab.path("held-out.txt")));
    assert!(said.contains("held-out.txt") && said.contains("too little"), "{said}");
    let bodies = lab.path("bodies.jsonl");
    std::fs::write(&bodies, "{\"body\": \"words\"}\n").unwrap();
    let said = refused(dir().arg("--text").arg(&bodies));
    assert!(said.contains("body") && said.contains("--text-field"), "{said}");
    let said = refused(dir().arg("--text").arg(&bodies).args(["--text-field", "body"]));
    assert!(said.contains("too little"), "{said}");
    // A machine where cargo never downloaded anything.
    let said = refused(dir().env("CARGO_HOME", lab.path("texts")));
    assert!(said.contains("cargo fetch") && said.contains("--text"), "{said}");
}
