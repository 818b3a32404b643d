//! A full disk, as a real small tmpfs: training goes on, the last good checkpoint stays, and the run resumes from it; a
//! quantised model is there whole or not at all.

mod lab;

use lab::{Lab, text};
use std::ffi::OsStr;
use std::process::{Command, Output};

/// A mount of our own needs a user namespace; not every machine lets users have one.
fn can_mount() -> bool {
    let can = Command::new("unshare").args(["-rm", "true"]).output().is_ok_and(|o| o.status.success());
    if !can {
        println!("skipped: `unshare -rm` is not allowed here, so no small tmpfs can be mounted");
    }
    can
}

/// Runs a script with the binary as `$FERROPT` and a file system of this size at `$SMALL`, up to its first command that fails.
fn on_small_disk(lab: &Lab, size: &str, script: &str, variables: &[(&str, &OsStr)]) -> Output {
    std::fs::create_dir(lab.path("small")).unwrap();
    let script = format!("set -e\nmount -t tmpfs -o size={size} tmpfs \"$SMALL\"\n{script}");
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", &script]).envs(variables.iter().copied());
    let command = command.env("FERROPT", env!("CARGO_BIN_EXE_ferropt")).env("SMALL", lab.path("small"));
    command.output().unwrap()
}

#[test]
fn a_full_disk_only_keeps_weights_from_being_kept() {
    let lab = Lab::new();
    if !can_mount() {
        return;
    }
    let script =
        "FERROPT_CACHE=\"$SMALL/cache\" $FERROPT generate --model \"$MODEL\" --max-tokens 4 'The cat'
        find \"$SMALL\" -type f";
    let out = on_small_disk(
        &lab,
        "4m",
        script,
        &[("FERROPT_CACHE_SIZE", "1GB".as_ref()), ("MODEL", lab.wide_model().as_ref())],
    );
    let (printed, said) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && printed.starts_with("The cat"), "{}", text(&out));
    assert!(!printed.contains("/small/"), "something is left: {printed}");
    assert!(said.contains("warning") && said.contains("free"), "{said}");
}

#[test]
fn a_quantised_model_that_does_not_fit_leaves_nothing() {
    let lab = Lab::new();
    if !can_mount() {
        return;
    }
    lab.train(&lab.config("run", 5), &[]);
    let script = "if $FERROPT checkpoint quantize \"$RUN\" \"$SMALL/q\" --weights int8; then echo 'it fits'; exit 1; fi
        [ -z \"$(ls -A \"$SMALL\")\" ]";
    let out = on_small_disk(&lab, "16k", script, &[("RUN", lab.path("run").as_ref())]);
    assert!(out.status.success(), "{}", text(&out));
    assert!(text(&out).contains("No space left") && text(&out).contains("was not written"), "{}", text(&out));
}

#[test]
fn a_full_disk_costs_no_good_checkpoint() {
    let lab = Lab::new();
    if !can_mount() {
        return;
    }
    lab.train(&lab.config("whole", 30), &[]);
    let config = lab.config("small/run", 30);
    // Room for the run folder and one checkpoint; a ballast leaves too little for a second until it is removed.
    let script = "$FERROPT train \"$CONFIG\" --set run.steps=5 --set schedule.total=30
        dd if=/dev/zero of=\"$SMALL/ballast\" bs=4k 2>/dev/null || true
        if $FERROPT train \"$CONFIG\" --set schedule.total=30; then echo 'full disk went unnoticed'; exit 1; fi
        rm \"$SMALL/ballast\"
        $FERROPT train \"$CONFIG\" --set schedule.total=30
        cp -r \"$SMALL/run\" \"$KEEP\"";
    let out = on_small_disk(
        &lab,
        "4m",
        script,
        &[("CONFIG", config.as_ref()), ("KEEP", lab.path("kept").as_ref())],
    );
    assert!(out.status.success(), "{}", text(&out));
    assert!(text(&out).to_lowercase().contains("no space") || text(&out).contains("free"), "{}", text(&out));
    assert!(lab.tensors("kept", 30) == lab.tensors("whole", 30), "the resumed run has other bits");
}

/// A rate far too high, and a disk that what is kept of the batches fills up: neither a checkpoint nor what is rolled back can be
/// kept, and the run goes back all the same, until it gives up.
#[test]
fn a_full_disk_does_not_end_a_roll_back() {
    let lab = Lab::new();
    if !can_mount() {
        return;
    }
    let config = lab.config("small/run", 50);
    let script = "$FERROPT train \"$CONFIG\" --set batch.tokens=2048 --set recovery.max_rollbacks=2 --set optimizer.kind=sgd \
            --set optimizer.betas= --set optimizer.lr=1e30 --set optimizer.clip=0 || echo \"status $?\"
        cp -r \"$SMALL/run\" \"$KEEP\"";
    let out = on_small_disk(
        &lab,
        "64k",
        script,
        &[("CONFIG", config.as_ref()), ("KEEP", lab.path("kept").as_ref())],
    );
    let said = text(&out);
    assert!(out.status.success(), "{said}");
    for part in
        ["the batch could not be kept", "was not saved", "warning: cannot", "2 roll-backs did not help"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(said.contains("status 3"), "{said}");
    let steps: Vec<u64> = lab.metric("kept", "loss").into_iter().map(|(step, _)| step).collect();
    assert!(steps.iter().all(|step| *step == 1) && steps.len() <= 1, "{steps:?}: {said}");
}
