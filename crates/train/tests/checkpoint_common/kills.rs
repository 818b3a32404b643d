//! What has to hold after a kill.

use crate::checkpoint_common::assert_content;
use ferropt_train::checkpoint::Store;

/// Every checkpoint of the store is whole, and the newest is at least the one that was said to be `durable`.
/// Gives its step.
pub fn newest_of_whole(store: &Store, durable: u64, round: u64) -> u64 {
    for entry in store.list().unwrap() {
        assert!(entry.damage.is_none(), "round {round}: {entry:?}");
        assert_content(&store.load(entry.step).unwrap());
    }
    let Some(found) = store.latest_whole().unwrap() else { return durable };
    let step = found.checkpoint.manifest().run.step;
    assert!(step >= durable, "step {durable} was durable, the newest is {step}");
    step
}
