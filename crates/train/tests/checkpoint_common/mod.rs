//! Snapshots whose every number follows from their step, so that a mix of two steps cannot go unnoticed.

use ferropt_train::checkpoint::{
    Checkpoint, Data, Event, Group, Retention, RunState, Share, Snapshot, Store, Team, Tensor, Writer,
};
use half::bf16;
use serde_json::json;
use std::path::Path;

fn value(step: u64, salt: u64, index: usize) -> f32 {
    let mixed = (step * 1_000_003 + salt * 7919 + index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 40) as f32 / 65536.0 - 128.0
}

fn f32s(step: u64, salt: u64, shape: &[usize]) -> Data {
    Data::F32((0..shape.iter().product()).map(|i| value(step, salt, i)).collect())
}

fn tensors(step: u64, rows: usize) -> Vec<Group> {
    let tensor = |name: &str, shape: &[usize], data| Tensor { name: name.into(), shape: shape.into(), data };
    let narrow = (0..7).map(|i| bf16::from_f32(value(step, 3, i))).collect();
    let moments = |name: &str, salt| Group {
        name: name.into(),
        tensors: vec![tensor("w", &[rows, 16], f32s(step, salt, &[rows, 16]))],
    };
    vec![
        Group {
            name: "model".into(),
            tensors: vec![
                // Odd-sized bf16 first: what follows must still be aligned.
                tensor("half", &[7], Data::Bf16(narrow)),
                tensor("w", &[rows, 16], f32s(step, 1, &[rows, 16])),
                tensor("b", &[16], f32s(step, 2, &[16])),
                tensor("empty", &[0, 4], Data::F32(Vec::new())),
            ],
        },
        moments("adam_m", 4),
        moments("adam_v", 5),
    ]
}

/// About `192 * rows` bytes.
pub fn snapshot(step: u64, rows: usize) -> Snapshot {
    Snapshot {
        run: RunState {
            step,
            tokens: step * 512,
            rollbacks: 0,
            early: false,
            seed: u64::MAX - 7,
            model: json!({ "rows": rows }),
            config: json!({ "train": { "lr": 6e-4 } }),
            loop_state: json!({ "loss_ema": 10.0 / step as f64 }),
        },
        groups: tensors(step, rows),
        files: vec![("config.json".into(), br#"{"model_type": "opt"}"#.to_vec())],
    }
}

/// Every number of a checkpoint is what [`snapshot`] gave.
pub fn assert_content(checkpoint: &Checkpoint) {
    let run = &checkpoint.manifest().run;
    let rows = run.model["rows"].as_u64().unwrap() as usize;
    let expected = snapshot(run.step, rows);
    assert_eq!(*run, expected.run);
    assert_eq!(checkpoint.file("config.json").unwrap(), expected.files[0].1);
    for group in expected.groups {
        assert_eq!(checkpoint.manifest().groups[&group.name].len(), group.tensors.len());
        for Tensor { name, shape, data } in group.tensors {
            let found = checkpoint.tensor(&group.name, &name).unwrap();
            assert_eq!(found.shape, shape, "{name}");
            assert_eq!(found.dtype, data.dtype(), "{name}");
            let wide = match data {
                Data::F32(values) => values,
                Data::Bf16(values) => values.iter().map(|v| v.to_f32()).collect(),
            };
            assert_eq!(found.to_f32(), wide, "{name}");
        }
    }
}

/// The part of a snapshot that one of several ranks owns.
#[allow(dead_code)]
pub fn owned(mut snapshot: Snapshot, share: Share) -> Snapshot {
    let mut number = 0;
    for group in &mut snapshot.groups {
        group.tensors.retain(|_| {
            number += 1;
            number % share.of == share.rank
        });
    }
    snapshot
}

/// Saves one after another and returns what the writer told.
#[allow(dead_code)] // not every test file saves
pub fn save(run: &Path, snapshots: Vec<Snapshot>, retention: Retention, shard_bytes: u64) -> Vec<Event> {
    let store = Store::open_for_writing(run).unwrap();
    let mut writer = Writer::start(store, retention, shard_bytes, Team::alone()).unwrap();
    for snapshot in snapshots {
        writer.save(|| Ok(snapshot)).unwrap();
    }
    writer.finish()
}
