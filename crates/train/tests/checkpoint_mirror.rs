//! Copies of checkpoints in a mirror, here a folder; `scripts/check-object-store` has a real server and real runs.
#![cfg(feature = "object-store")]

mod checkpoint_common;

use checkpoint_common::{assert_content, owned, snapshot};
use ferropt_train::checkpoint::mirror::{Copies, Mirror};
use ferropt_train::checkpoint::{Event, Found, Retention, Share, Snapshot, Store, Team, Writer};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Barrier, Mutex};
use std::time::Duration;

const SHARD_BYTES: u64 = 20_000;

/// A run folder and a mirror.
struct Lab {
    _folder: tempfile::TempDir,
    run: PathBuf,
    mirror: PathBuf,
}

impl Lab {
    fn new() -> Lab {
        let folder = tempfile::tempdir().unwrap();
        let [run, mirror] = ["run", "mirror"].map(|name| folder.path().join(name));
        fs::create_dir(&run).unwrap();
        Lab { _folder: folder, run, mirror }
    }

    fn copies(&self, keep_last: usize, keep_every: Option<u64>) -> Copies {
        let url = format!("file://{}", self.mirror.display());
        Copies { url, retention: Retention { keep_last, keep_every } }
    }

    /// What is in the mirror: step, and whether it has a manifest.
    fn mirrored(&self) -> Vec<(u64, bool)> {
        let folders = fs::read_dir(&self.mirror).unwrap().map(|entry| entry.unwrap());
        let folders = folders.map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            let step = name.strip_prefix("step-").unwrap()[..8].parse().unwrap();
            (step, entry.path().join("manifest.json").exists())
        });
        let mut folders: Vec<_> = folders.collect();
        folders.sort();
        folders
    }

    fn folder_of(&self, step: u64) -> PathBuf {
        let mut folders = fs::read_dir(&self.mirror).unwrap().map(|entry| entry.unwrap().path());
        folders.find(|path| path.to_str().unwrap().contains(&format!("step-{step:08}"))).unwrap()
    }

    /// Saves by so many ranks, each save once the last is copied, so that none is passed over. Returns what each told.
    fn save(&self, snapshots: &[Snapshot], of: usize, copies: &Copies) -> Vec<Vec<Event>> {
        let teams = (0..of).map(|rank| Team {
            share: Share { rank, of },
            attempt: 1,
            patience: Duration::from_secs(20),
        });
        let start = |team: Team| {
            let store = match team.share.rank {
                0 => Store::open_for_writing(&self.run),
                _ => Store::open(&self.run),
            };
            let mut writer =
                Writer::start(store.unwrap(), Retention::ALL, SHARD_BYTES, team.clone()).unwrap();
            writer.copy_to(copies, team.clone(), None).unwrap();
            (writer, team)
        };
        let writers: Vec<_> = teams.map(start).collect();
        std::thread::scope(|scope| {
            let rank = |(mut writer, team): (Writer, Team)| {
                scope.spawn(move || {
                    let mut told = Vec::new();
                    for snapshot in snapshots {
                        writer.save(|| Ok(owned(snapshot.clone(), team.share))).unwrap();
                        let copied = |event: &Event| {
                            matches!(event, Event::Mirrored { .. } | Event::NotMirrored { .. })
                        };
                        let before = told.len();
                        while !told[before..].iter().any(copied) {
                            told.extend(writer.poll());
                            std::thread::sleep(Duration::from_millis(1));
                        }
                    }
                    told.extend(writer.finish());
                    told
                })
            };
            let threads: Vec<_> = writers.into_iter().map(rank).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Fetches by so many ranks into the run folder; all must find the same.
    fn fetch(&self, of: usize, than: Option<u64>) -> Result<Option<(u64, Vec<String>)>, String> {
        self.fetch_while(of, than, &|_| ())
    }

    /// [`Lab::fetch`] while something happens whenever a rank tells the others of what it did.
    fn fetch_while(
        &self,
        of: usize,
        than: Option<u64>,
        happens: &(dyn Fn(usize) + Sync),
    ) -> Result<Option<(u64, Vec<String>)>, String> {
        let (barrier, said) = (Barrier::new(of), Mutex::new(vec![Vec::new(); of]));
        let mut found = std::thread::scope(|scope| {
            let rank = |rank| {
                let (barrier, said) = (&barrier, &said);
                scope.spawn(move || {
                    let mirror = Mirror::create(&self.copies(1, None).url).unwrap();
                    let store = Store::open(&self.run).unwrap();
                    fs::create_dir_all(store.path()).unwrap();
                    let exchange = |bytes: &[u8]| {
                        happens(rank);
                        said.lock().unwrap()[rank] = bytes.to_vec();
                        barrier.wait();
                        let all = said.lock().unwrap().clone();
                        barrier.wait();
                        Ok(all)
                    };
                    let found =
                        mirror.fetch_newer(&store, Share { rank, of }, than.map(|step| (0, step)), exchange);
                    found
                        .map_err(|error| format!("{error:#}"))
                        .map(|found| found.map(|found| described(&found)))
                })
            };
            let threads: Vec<_> = (0..of).map(rank).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{found:?}");
        found.remove(0)
    }

    fn lose_the_disk(&self) {
        fs::remove_dir_all(&self.run).unwrap();
        fs::create_dir(&self.run).unwrap();
    }
}

fn described(found: &Found) -> (u64, Vec<String>) {
    assert_content(&found.checkpoint);
    let damaged = found.damaged.iter().map(|error| format!("{error:#}")).collect();
    (found.checkpoint.manifest().run.step, damaged)
}

fn snapshots(steps: &[u64]) -> Vec<Snapshot> {
    steps.iter().map(|&step| snapshot(step, 400)).collect()
}

fn names_in(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn what_is_saved_is_copied_kept_as_told_and_fetched_by_any_number_of_ranks() {
    for of in [1, 3] {
        let lab = Lab::new();
        for told in lab.save(&snapshots(&[1, 2, 3, 4, 5]), of, &lab.copies(2, Some(2))) {
            let copied = told.iter().filter(|event| matches!(event, Event::Mirrored { .. })).count();
            assert_eq!((told.len(), copied), (10, 5), "{told:?}");
        }
        assert_eq!(lab.mirrored(), [(2, true), (4, true), (5, true)]);
        // The copy is the checkpoint.
        let here = lab.run.join("checkpoints/step-00000005");
        for name in names_in(&here) {
            assert_eq!(
                fs::read(here.join(&name)).unwrap(),
                fs::read(lab.folder_of(5).join(&name)).unwrap(),
                "{name}"
            );
        }
        assert_eq!(lab.fetch(2, Some(5)), Ok(None));
        for ranks in [1, 2, 5] {
            lab.lose_the_disk();
            assert_eq!(lab.fetch(ranks, None), Ok(Some((5, Vec::new()))));
            assert_eq!(names_in(&lab.run.join("checkpoints")), ["step-00000005"]);
            assert_eq!(lab.fetch(ranks, Some(4)).unwrap().unwrap().0, 5, "in place of the one that is here");
        }
    }
}

#[test]
fn what_was_found_at_the_start_is_copied_if_it_is_not_there() {
    let lab = Lab::new();
    checkpoint_common::save(&lab.run, snapshots(&[7]), Retention::ALL, SHARD_BYTES);
    for copied in [1, 0] {
        let store = Store::open_for_writing(&lab.run).unwrap();
        let found = store.latest_whole().unwrap().unwrap().checkpoint;
        let mut writer = Writer::start(store, Retention::ALL, SHARD_BYTES, Team::alone()).unwrap();
        writer.copy_to(&lab.copies(1, None), Team::alone(), Some(&found)).unwrap();
        assert_eq!(writer.finish().len(), copied);
        assert_eq!(lab.mirrored(), [(7, true)]);
    }
}

#[test]
fn a_copy_that_was_cut_off_is_no_checkpoint_and_is_taken_up() {
    let lab = Lab::new();
    lab.save(&snapshots(&[1, 2]), 1, &lab.copies(5, None));
    // As it is when the process is killed in the middle of the upload of step 2.
    let folder = lab.folder_of(2);
    fs::remove_file(folder.join("manifest.json")).unwrap();
    fs::remove_file(folder.join("adam_v.safetensors")).unwrap();
    let kept = folder.join("adam_m.safetensors");
    let before = kept.metadata().unwrap().modified().unwrap();
    let here = Store::open(&lab.run).unwrap().latest_whole().unwrap().unwrap().checkpoint;
    lab.lose_the_disk();
    assert_eq!(lab.fetch(2, None).unwrap().unwrap().0, 1);

    drop(here);
    let lab2 = Lab::new();
    checkpoint_common::save(&lab2.run, snapshots(&[2]), Retention::ALL, SHARD_BYTES);
    let store = Store::open_for_writing(&lab2.run).unwrap();
    let found = store.latest_whole().unwrap().unwrap().checkpoint;
    let mut writer = Writer::start(store, Retention::ALL, SHARD_BYTES, Team::alone()).unwrap();
    writer.copy_to(&lab.copies(5, None), Team::alone(), Some(&found)).unwrap();
    let told = writer.finish();
    assert!(matches!(told[..], [Event::Mirrored { step: 2, .. }]), "{told:?}");
    assert_eq!(lab.mirrored(), [(1, true), (2, true)]);
    assert_eq!(kept.metadata().unwrap().modified().unwrap(), before, "what was there was uploaded again");
}

#[test]
fn damage_in_the_mirror_is_passed_over_and_told() {
    let lab = Lab::new();
    lab.save(&snapshots(&[1, 2, 3]), 2, &lab.copies(5, None));
    let flip = |file: PathBuf| {
        let mut content = fs::read(&file).unwrap();
        *content.last_mut().unwrap() ^= 1;
        fs::write(file, content).unwrap();
    };
    flip(lab.folder_of(3).join("manifest.json"));
    flip(lab.folder_of(2).join("adam_m.safetensors"));
    for of in [1, 3] {
        lab.lose_the_disk();
        let (step, damaged) = lab.fetch(of, None).unwrap().unwrap();
        assert_eq!((step, damaged.len()), (1, 2), "{damaged:?}");
        assert!(
            damaged[0].contains("manifest.json") && damaged[1].contains("adam_m.safetensors"),
            "{damaged:?}"
        );
        assert_eq!(names_in(&lab.run.join("checkpoints")), ["step-00000001"]);
    }
    fs::remove_dir_all(lab.folder_of(1)).unwrap();
    lab.lose_the_disk();
    let error = lab.fetch(2, None).unwrap_err();
    assert!(error.contains("no newer checkpoint") && error.contains("adam_m.safetensors"), "{error}");
    assert!(names_in(&lab.run.join("checkpoints")).is_empty());
}

/// Each rank verifies its share of the files, so that one of them finds what the others do not look at.
#[test]
fn damage_that_one_rank_finds_in_what_was_fetched_is_damage_to_all() {
    let lab = Lab::new();
    lab.save(&snapshots(&[1]), 2, &lab.copies(5, None));
    lab.lose_the_disk();
    let fetched = lab.run.join("checkpoints/step-00000001/adam_m.safetensors");
    let whole = Mutex::new(true);
    let damage = |rank| {
        if rank == 0 && fetched.exists() && std::mem::take(&mut *whole.lock().unwrap()) {
            let mut content = fs::read(&fetched).unwrap();
            *content.last_mut().unwrap() ^= 1;
            fs::write(&fetched, content).unwrap();
        }
    };
    let error = lab.fetch_while(2, None, &damage).unwrap_err();
    assert!(error.contains("adam_m.safetensors is damaged") && error.contains("found by rank"), "{error}");
}

#[test]
fn a_checkpoint_that_is_damaged_here_is_not_copied() {
    let lab = Lab::new();
    checkpoint_common::save(&lab.run, snapshots(&[1]), Retention::ALL, SHARD_BYTES);
    let store = Store::open_for_writing(&lab.run).unwrap();
    let found = store.latest_whole().unwrap().unwrap().checkpoint;
    let file = lab.run.join("checkpoints/step-00000001/adam_v.safetensors");
    let mut content = fs::read(&file).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::write(&file, content).unwrap();
    let mut writer = Writer::start(store, Retention::ALL, SHARD_BYTES, Team::alone()).unwrap();
    writer.copy_to(&lab.copies(5, None), Team::alone(), Some(&found)).unwrap();
    let told = writer.finish();
    let [Event::NotMirrored { step: 1, error }] = &told[..] else { panic!("{told:?}") };
    assert!(format!("{error:#}").contains("adam_v.safetensors of step 1 is damaged"), "{error:#}");
    assert_eq!(lab.mirrored(), [(1, false)]);
}

#[test]
fn a_mirror_that_lags_behind_says_so_and_has_the_newest() {
    let lab = Lab::new();
    let store = Store::open_for_writing(&lab.run).unwrap();
    let mut writer = Writer::start(store, Retention::ALL, SHARD_BYTES, Team::alone()).unwrap();
    writer.copy_to(&lab.copies(100, None), Team::alone(), None).unwrap();
    for step in 1..=30 {
        writer.save(|| Ok(snapshot(step, 400))).unwrap();
    }
    let told = writer.finish();
    for event in &told {
        match event {
            Event::Saved { .. } | Event::Mirrored { .. } => {}
            Event::NotMirrored { error, .. } => {
                assert!(format!("{error:#}").contains("lags behind"), "{error:#}")
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(lab.mirrored().last(), Some(&(30, true)));
    assert!(lab.mirrored().iter().all(|(_, whole)| *whole));
}

#[test]
fn what_is_there_is_listed_verified_and_fetched_from_outside() {
    let lab = Lab::new();
    lab.save(&snapshots(&[1, 2, 3, 4]), 2, &lab.copies(9, None));
    let cut = |file: &PathBuf| {
        let content = fs::read(file).unwrap();
        fs::write(file, &content[1..]).unwrap();
    };
    // Step 2 has a flipped byte, 3 a file that is too short, 4 no manifest.
    let flipped = lab.folder_of(2).join("adam_m.safetensors");
    let mut content = fs::read(&flipped).unwrap();
    content[100] ^= 1;
    fs::write(&flipped, content).unwrap();
    cut(&lab.folder_of(3).join("adam_v.safetensors"));
    fs::remove_file(lab.folder_of(4).join("manifest.json")).unwrap();

    let mirror = Mirror::open(&lab.copies(1, None).url).unwrap();
    let copies = mirror.list().unwrap();
    let told = |n: usize| copies[n].damage.as_ref().map(|error| format!("{error:#}"));
    // One whose manifest cannot be read counts as never rolled back, as these were.
    assert_eq!(copies.iter().map(|copy| copy.step).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!((told(0), told(1)), (None, None), "sizes are right");
    assert!(told(2).unwrap().starts_with("adam_v.safetensors has "), "{:?}", told(2));
    assert!(told(3).unwrap().contains("no manifest"), "{:?}", told(3));
    let here: u64 =
        fs::read_dir(lab.folder_of(1)).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
    assert_eq!((copies[0].bytes, copies[0].files), (here, fs::read_dir(lab.folder_of(1)).unwrap().count()));

    let mut seen = Vec::new();
    assert!(mirror.verify(&copies[0], &mut |n, of| seen.push((n, of))).unwrap().is_empty());
    assert!(seen.is_sorted() && seen.last().is_some_and(|(n, of)| n == of), "{seen:?}");
    let found = mirror.verify(&copies[1], &mut |_, _| ()).unwrap();
    assert!(
        matches!(&found[..], [one] if one.contains("adam_m.safetensors") && one.contains("CRC-32C")),
        "{found:?}"
    );

    let elsewhere = lab.run.join("elsewhere");
    let store = Store::open_for_writing(&elsewhere).unwrap();
    assert_content(&mirror.fetch_copy(&copies[0], &store, &mut |_, _| ()).unwrap());
    for (copy, word) in [(&copies[0], "there already"), (&copies[1], "damaged")] {
        let error = mirror.fetch_copy(copy, &store, &mut |_, _| ()).unwrap_err();
        assert!(format!("{error:#}").contains(word), "{error:#}");
    }
    assert_eq!(names_in(&elsewhere.join("checkpoints")), [".lock", "step-00000001"]);

    let missing = format!("file://{}/absent", lab.run.display());
    assert!(Mirror::open(&missing).is_err() && !lab.run.join("absent").exists());
}
