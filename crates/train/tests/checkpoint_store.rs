//! Saving, listing, loading and keeping of checkpoints, and damage done to files.

mod checkpoint_common;

use checkpoint_common::{assert_content, save, snapshot};
use ferropt_train::checkpoint::{
    DEFAULT_SHARD_BYTES, Data, Event, FileEntry, Manifest, Retention, Store, Team, Tensor, Writer,
};
use std::fs;
use std::path::{Path, PathBuf};

/// A run folder with whole checkpoints of the given steps, in small shards.
fn run_with(steps: &[u64]) -> tempfile::TempDir {
    let run = tempfile::tempdir().unwrap();
    let snapshots = steps.iter().map(|&step| snapshot(step, 20)).collect();
    for event in save(run.path(), snapshots, Retention::ALL, 1000) {
        assert!(matches!(event, Event::Saved { .. }), "{event:?}");
    }
    run
}

fn step_dir(run: &Path, step: u64) -> PathBuf {
    run.join(format!("checkpoints/step-{step:08}"))
}

fn files_of(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn names_in(run: &Path) -> Vec<String> {
    let files = files_of(&run.join("checkpoints"));
    files.iter().map(|file| file.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn comes_back_to_the_bit() {
    for shard_bytes in [1, 1000, DEFAULT_SHARD_BYTES] {
        let run = tempfile::tempdir().unwrap();
        let events = save(run.path(), vec![snapshot(100, 50)], Retention::ALL, shard_bytes);
        let [Event::Saved { step: 100, path, bytes, .. }] = &events[..] else { panic!("{events:?}") };
        assert_eq!(*path, step_dir(run.path(), 100));
        let on_disk: u64 = files_of(path).iter().map(|file| file.metadata().unwrap().len()).sum();
        assert_eq!(*bytes, on_disk - path.join("manifest.json").metadata().unwrap().len());
        let checkpoint = Store::open(run.path()).unwrap().load(100).unwrap();
        assert_content(&checkpoint);
        let missing = checkpoint.tensor("model", "x").unwrap_err().to_string();
        assert!(
            missing.contains("no tensor x in group model") && missing.contains("adam_m (1)"),
            "{missing}"
        );
    }
}

#[test]
fn model_opens_with_a_plain_safetensors_reader() {
    let run = tempfile::tempdir().unwrap();
    save(run.path(), vec![snapshot(3, 50)], Retention::ALL, DEFAULT_SHARD_BYTES);
    let content = fs::read(step_dir(run.path(), 3).join("model.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&content).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    let tensors = safetensors::SafeTensors::deserialize(&content).unwrap();
    let weight = tensors.tensor("w").unwrap();
    assert_eq!(weight.shape(), [50, 16]);
    let Data::F32(expected) = &snapshot(3, 50).groups[0].tensors[1].data else { panic!() };
    assert_eq!(weight.data(), bytemuck::cast_slice::<f32, u8>(expected));
}

#[test]
fn shards_have_the_index_that_hugging_face_expects() {
    let run = run_with(&[3]);
    let directory = step_dir(run.path(), 3);
    let index = fs::read(directory.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], 7 * 2 + 20 * 16 * 4 + 16 * 4);
    for (name, file) in index["weight_map"].as_object().unwrap() {
        let content = fs::read(directory.join(file.as_str().unwrap())).unwrap();
        assert!(safetensors::SafeTensors::deserialize(&content).unwrap().tensor(name).is_ok(), "{name}");
    }
    assert_eq!(index["weight_map"].as_object().unwrap().len(), 4);
}

#[test]
fn latest_is_the_newest_and_none_without_any() {
    let run = run_with(&[100, 300, 200]);
    let store = Store::open(run.path()).unwrap();
    let steps: Vec<u64> = store.list().unwrap().iter().map(|entry| entry.step).collect();
    assert_eq!(steps, [100, 200, 300]);
    let found = store.latest_whole().unwrap().unwrap();
    assert_eq!(found.checkpoint.manifest().run.step, 300);
    assert!(found.damaged.is_empty());
    let missing = store.load(150).unwrap_err().to_string();
    assert!(missing.contains("no checkpoint of step 150") && missing.contains("100, 200, 300"), "{missing}");

    let empty = tempfile::tempdir().unwrap();
    assert!(Store::open(empty.path()).unwrap().latest_whole().unwrap().is_none());
    assert!(Store::open(empty.path().join("nowhere")).is_err());
}

/// Damages step 200 of a fresh run and expects the error to name `file`, and step 100 to be used instead.
fn damage(file: &str, act: impl FnOnce(&Path)) -> String {
    let run = run_with(&[100, 200]);
    let path = step_dir(run.path(), 200).join(file);
    assert!(path.exists(), "{file} is not part of a checkpoint");
    act(&path);
    let store = Store::open(run.path()).unwrap();
    let error = format!("{:#}", store.load(200).unwrap_err());
    assert!(error.contains("step-00000200"), "{error}");
    let found = store.latest_whole().unwrap().unwrap();
    assert_content(&found.checkpoint);
    assert_eq!(found.checkpoint.manifest().run.step, 100);
    let told: Vec<String> = found.damaged.iter().map(|error| format!("{error:#}")).collect();
    assert_eq!(told, std::slice::from_ref(&error));
    error
}

#[test]
fn a_flipped_byte_in_any_file_is_found_and_named() {
    let files = files_of(&step_dir(run_with(&[200]).path(), 200));
    assert_eq!(files.len(), 7, "{files:?}");
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        for place in [0.0, 0.3, 0.7, 1.0] {
            let error = damage(name, |path| {
                let mut content = fs::read(path).unwrap();
                let place = (place * (content.len() - 1) as f64) as usize;
                content[place] ^= 0x10;
                fs::write(path, content).unwrap();
            });
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}

#[test]
fn every_single_byte_of_a_checkpoint_is_guarded() {
    let run = tempfile::tempdir().unwrap();
    save(run.path(), vec![snapshot(1, 1)], Retention::ALL, DEFAULT_SHARD_BYTES);
    let store = Store::open(run.path()).unwrap();
    for file in files_of(&step_dir(run.path(), 1)) {
        let whole = fs::read(&file).unwrap();
        for place in 0..whole.len() {
            let mut content = whole.clone();
            content[place] = content[place].wrapping_add(1 + (place % 255) as u8);
            fs::write(&file, &content).unwrap();
            assert!(store.load(1).is_err(), "byte {place} of {}", file.display());
        }
        fs::write(&file, whole).unwrap();
    }
    assert_content(&store.load(1).unwrap());
}

#[test]
fn truncated_and_missing_files_are_found_without_reading_tensors() {
    for file in ["model-00001-of-00002.safetensors", "adam_v.safetensors", "config.json", "manifest.json"] {
        let truncate = |path: &Path| {
            let content = fs::read(path).unwrap();
            fs::write(path, &content[..content.len() - 1]).unwrap();
        };
        let error = damage(file, truncate);
        assert!(error.contains(file), "{error}");
        let error = damage(file, |path| fs::remove_file(path).unwrap());
        assert!(error.contains(file) || error.contains("no manifest"), "{error}");

        let run = run_with(&[7]);
        truncate(&step_dir(run.path(), 7).join(file));
        assert!(Store::open(run.path()).unwrap().list().unwrap()[0].damage.is_some(), "{file}");
    }
}

/// Rewrites a manifest with a valid checksum but other content.
fn edit_manifest(path: &Path, edit: impl FnOnce(&mut Manifest)) {
    let mut manifest = Manifest::from_bytes(&fs::read(path).unwrap()).unwrap();
    edit(&mut manifest);
    fs::write(path, manifest.to_bytes().unwrap()).unwrap();
}

#[test]
fn a_manifest_that_does_not_match_its_shards_is_refused() {
    let error = damage("manifest.json", |path| {
        edit_manifest(path, |manifest| {
            let weight = manifest.groups.get_mut("model").unwrap().get_mut("w").unwrap();
            weight.shape.reverse();
        });
    });
    assert!(
        error.contains("[20, 16]") && error.contains("[16, 20]") && error.contains("tensor w"),
        "{error}"
    );

    let error = damage("manifest.json", |path| {
        edit_manifest(path, |manifest| {
            manifest.groups.get_mut("adam_m").unwrap().remove("w");
        });
    });
    assert!(error.contains("tensor w is not in the manifest"), "{error}");

    let error = damage("manifest.json", |path| {
        edit_manifest(path, |manifest| {
            let b = manifest.groups["model"]["b"].clone();
            manifest.groups.get_mut("model").unwrap().insert("c".into(), b);
        });
    });
    assert!(error.contains("tensor c is missing"), "{error}");

    let error = damage("manifest.json", |path| {
        edit_manifest(path, |manifest| {
            manifest.files.insert("gone".into(), FileEntry { bytes: 0, crc32c: "00000000".into() });
        });
    });
    assert!(error.contains("gone"), "{error}");
}

#[test]
fn foreign_directories_are_refused() {
    let error = damage("manifest.json", |path| fs::write(path, r#"{"tensors": []}"#).unwrap());
    assert!(error.contains("not the manifest of a Ferropt checkpoint"), "{error}");
    // Another run's manifest: its checksum holds, its files do not.
    let other = tempfile::tempdir().unwrap();
    let mut same_step = snapshot(201, 20);
    same_step.run.step = 200;
    save(other.path(), vec![same_step], Retention::ALL, 1000);
    let foreign = step_dir(other.path(), 200).join("manifest.json");
    let error = damage("manifest.json", |path| {
        fs::copy(foreign, path).unwrap();
    });
    assert!(error.contains("CRC-32C"), "{error}");
    // A directory moved to another step's name would resume at the wrong place.
    let run = run_with(&[100]);
    fs::rename(step_dir(run.path(), 100), step_dir(run.path(), 900)).unwrap();
    let error = format!("{:#}", Store::open(run.path()).unwrap().load(900).unwrap_err());
    assert!(error.contains("step 100") && error.contains("step-00000900"), "{error}");
}

#[test]
fn all_damaged_is_an_error_that_names_each() {
    let run = run_with(&[100, 200]);
    fs::remove_file(step_dir(run.path(), 100).join("adam_m.safetensors")).unwrap();
    fs::remove_file(step_dir(run.path(), 200).join("manifest.json")).unwrap();
    let error = Store::open(run.path()).unwrap().latest_whole().unwrap_err().to_string();
    assert!(error.contains("adam_m.safetensors") && error.contains("step-00000200"), "{error}");
}

#[test]
fn retention_keeps_the_last_and_the_multiples() {
    let run = tempfile::tempdir().unwrap();
    let snapshots = (1..=9).map(|i| snapshot(i * 100, 1)).collect();
    let retention = Retention { keep_last: 2, keep_every: Some(300) };
    save(run.path(), snapshots, retention, DEFAULT_SHARD_BYTES);
    let kept = [".lock", "step-00000300", "step-00000600", "step-00000800", "step-00000900"];
    assert_eq!(names_in(run.path()), kept);
}

#[test]
fn a_damaged_checkpoint_never_pushes_out_a_whole_one() {
    let run = run_with(&[100, 200]);
    let shard = step_dir(run.path(), 200).join("adam_m.safetensors");
    let mut content = fs::read(&shard).unwrap();
    *content.last_mut().unwrap() ^= 1; // same size: only loading finds it
    fs::write(&shard, content).unwrap();
    let retention = Retention { keep_last: 1, keep_every: None };
    save(run.path(), vec![snapshot(150, 20)], retention, 1000);
    let found = Store::open(run.path()).unwrap().latest_whole().unwrap().unwrap();
    assert_eq!(found.checkpoint.manifest().run.step, 150);
    // When training reaches step 200 again, the damaged one is replaced.
    save(run.path(), vec![snapshot(200, 20)], retention, 1000);
    assert_eq!(names_in(run.path()), [".lock", "step-00000200"]);
    assert_content(&Store::open(run.path()).unwrap().load(200).unwrap());
}

#[test]
fn saving_a_step_again_replaces_it() {
    let run = run_with(&[100]);
    save(run.path(), vec![snapshot(100, 30)], Retention::ALL, DEFAULT_SHARD_BYTES);
    let checkpoint = Store::open(run.path()).unwrap().load(100).unwrap();
    assert_eq!(checkpoint.manifest().run.model["rows"], 30);
    assert_content(&checkpoint);
    assert_eq!(names_in(run.path()), [".lock", "step-00000100"]);
}

#[test]
fn leftovers_go_at_the_next_start_and_are_never_listed() {
    let run = run_with(&[100]);
    let leftover = run.path().join("checkpoints/.step-00000200.tmp-4242");
    fs::create_dir(&leftover).unwrap();
    fs::copy(step_dir(run.path(), 100).join("manifest.json"), leftover.join("manifest.json")).unwrap();
    let reader = Store::open(run.path()).unwrap();
    assert_eq!(reader.list().unwrap().len(), 1);
    assert!(leftover.exists(), "a reader must not disturb a writer");
    drop(Store::open_for_writing(run.path()).unwrap());
    assert!(!leftover.exists());
}

#[test]
fn one_writer_at_a_time() {
    let run = tempfile::tempdir().unwrap();
    let first = Store::open_for_writing(run.path()).unwrap();
    first.sign(77).unwrap();
    let error = Store::open_for_writing(run.path()).unwrap_err().to_string();
    assert!(error.contains("another process is training"), "{error}");
    assert!(Store::open(run.path()).unwrap().is_signed(77), "a start that is refused changes nothing");
    drop(first);
    Store::open_for_writing(run.path()).unwrap();
}

#[test]
fn a_second_snapshot_is_made_only_when_the_first_is_on_disk() {
    let run = tempfile::tempdir().unwrap();
    let store = Store::open_for_writing(run.path()).unwrap();
    let mut writer = Writer::start(store, Retention::ALL, DEFAULT_SHARD_BYTES, Team::alone()).unwrap();
    for step in 1..5 {
        let before = step_dir(run.path(), step - 1);
        writer
            .save(|| {
                assert!(step == 1 || before.exists());
                Ok(snapshot(step, 5000))
            })
            .unwrap();
    }
    let steps = |events: Vec<Event>| -> Vec<u64> {
        let step = |event: Event| match event {
            Event::Saved { step, .. } => step,
            other => panic!("{other:?}"),
        };
        events.into_iter().map(step).collect()
    };
    let mut told = steps(writer.poll());
    assert!(told.starts_with(&[1, 2, 3]), "{told:?}");
    told.extend(steps(writer.finish()));
    assert_eq!(told, [1, 2, 3, 4]);
}

#[test]
fn impossible_snapshots_are_refused_with_their_names() {
    let refused = |edit: fn(&mut ferropt_train::checkpoint::Snapshot)| {
        let run = tempfile::tempdir().unwrap();
        let mut wrong = snapshot(1, 1);
        edit(&mut wrong);
        let events = save(run.path(), vec![wrong], Retention::ALL, DEFAULT_SHARD_BYTES);
        let [Event::Failed { step: 1, error }] = &events[..] else { panic!("{events:?}") };
        assert_eq!(names_in(run.path()), [".lock"]);
        format!("{error:#}")
    };
    let error = refused(|s| s.groups[0].tensors[1].shape = vec![3, 3]);
    assert!(error.contains("tensor w of group model has shape [3, 3] but 16 elements"), "{error}");
    let twin = |s: &mut ferropt_train::checkpoint::Snapshot| {
        let data = Data::F32(vec![0.0]);
        s.groups[1].tensors.push(Tensor { name: "w".into(), shape: vec![1], data });
    };
    assert!(refused(twin).contains("two tensors named \"w\""));
    assert!(refused(|s| s.groups[1].name = "../up".into()).contains("\"../up\""));
    assert!(refused(|s| s.files[0].0 = "a/b".into()).contains("\"a/b\""));
    assert!(refused(|s| s.files[0].0 = "manifest.json".into()).contains("\"manifest.json\""));
}

#[test]
fn what_was_saved_after_a_roll_back_is_newer_whatever_its_step() {
    let run = tempfile::tempdir().unwrap();
    let store = Store::open_for_writing(run.path()).unwrap();
    let mut writer = Writer::start(store, Retention::ALL, DEFAULT_SHARD_BYTES, Team::alone()).unwrap();
    for (step, rollbacks) in [(100, 0), (200, 0), (300, 0), (100, 1)] {
        let mut snapshot = snapshot(step, 10);
        snapshot.run.rollbacks = rollbacks;
        writer.save(|| Ok(snapshot)).unwrap();
        writer.settle().unwrap();
    }
    writer.finish();
    let store = Store::open(run.path()).unwrap();
    let order: Vec<(u64, u64)> = store.list().unwrap().iter().map(|e| (e.rollbacks, e.step)).collect();
    assert_eq!(order, [(0, 200), (0, 300), (1, 100)]);
    let found = store.latest_whole().unwrap().unwrap();
    assert_eq!((found.checkpoint.manifest().run.step, found.damaged.len()), (100, 0));
}
