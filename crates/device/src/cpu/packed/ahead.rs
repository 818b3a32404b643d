//! The beginning of the next matrix is brought to a thread's cache while it waits for the others, and for what lies between two
//! products. Which matrix that will be, each one remembers from the last time: layers are always walked in the same order.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError};

use crate::cpu::{CpuDevice, gemm};

/// Most rows of products that wait for memory, not for multiplications.
const ROWS: usize = 8;
/// Bytes for each thread: a part of its second-level cache.
const BYTES: usize = 128 << 10;

/// Where the panels of a matrix lie: an address, bytes of a panel, and how many there are.
pub(super) type Place = [usize; 3];

/// The matrix that was multiplied after another one the last time. Its numbers are read and written one by one; of a mixture of
/// two matrices something is brought near that nobody needs, and nothing else happens.
#[derive(Default)]
pub(in crate::cpu) struct Next([AtomicUsize; 3]);

impl Next {
    fn set(&self, place: Place) {
        self.0.iter().zip(place).for_each(|(to, number)| to.store(number, Relaxed));
    }

    fn get(&self) -> Place {
        std::array::from_fn(|i| self.0[i].load(Relaxed))
    }
}

/// Called just before all threads multiply `m` rows with a matrix: notes that it follows the one before, and tells threads what
/// to bring near when they have done their share.
pub(super) fn expect_next(device: &CpuDevice, m: usize, next: &Arc<Next>, place: Place) {
    if m > ROWS {
        return;
    }
    let mut before = device.before.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(before) = before.replace(next.clone()) {
        before.set(place);
    }
    let [start, stride, panels] = next.get();
    if panels > 0 {
        device
            .pool
            .expect(|thread| beginning(start, stride, gemm::first_panel(device, panels, thread)..panels));
    }
}

/// Addresses of the first of some panels.
fn beginning(start: usize, stride: usize, panels: Range<usize>) -> Range<usize> {
    let first = start + panels.start * stride;
    first..first + (panels.len() * stride).min(BYTES)
}
