//! Initial values: a function of (seed, parameter, element), so every layout begins alike.

use crate::parameters::{Initial, Parameter};
use crate::part::{Held, Part};
use ferropt_device::rng::{Purpose, Stream};
use std::num::NonZero;
use std::thread;

/// Fewer elements than this are not worth a thread.
const PER_THREAD: usize = 1 << 16;

/// Values of parameter number `index` before the first step, made on all threads.
pub fn initial_values(parameter: &Parameter, index: usize, seed: u64) -> Vec<f32> {
    initial_shard(&Held::new(parameter.clone(), index, Part::WHOLE), seed, None)
}

/// Values of a shard before the first step, and zeros in what it has to spare; made on so many threads, all available unless
/// given.
pub fn initial_shard(held: &Held, seed: u64, threads: Option<usize>) -> Vec<f32> {
    let mut values = vec![0.0f32; held.shard_len];
    let all = || thread::available_parallelism().map_or(1, NonZero::get);
    let threads = threads.unwrap_or_else(all).max(1);
    let share = held.shard.len().div_ceil(threads).max(PER_THREAD);
    thread::scope(|scope| {
        for (part, values) in values[..held.shard.len()].chunks_mut(share).enumerate() {
            scope.spawn(move || {
                let place = held.place().after(part * share);
                for (at, start, len) in place.pieces(0..values.len()) {
                    initial_elements(&held.parameter, held.index, seed, start, &mut values[at..at + len]);
                }
            });
        }
    });
    values
}

/// Rows of a parameter's values from `first` on, as many as `values` has room for; a vector's rows are its elements.
pub fn initial_rows(parameter: &Parameter, index: usize, seed: u64, first: usize, values: &mut [f32]) {
    initial_elements(parameter, index, seed, first * columns(parameter), values);
}

/// Elements of a parameter's values from `start` on, as many as `values` has room for.
fn initial_elements(parameter: &Parameter, index: usize, seed: u64, start: usize, values: &mut [f32]) {
    let std = match parameter.initial {
        Initial::Zeros => return values.fill(0.0),
        Initial::Ones => return values.fill(1.0),
        Initial::Normal(std) => std,
    };
    let (stream, columns) = (Stream::new(seed, Purpose::Init, index, 0), columns(parameter));
    let scale = |normal: f32| (normal as f64 * std) as f32;
    let (mut at, mut left) = (start, values);
    while !left.is_empty() {
        let (row, column) = ((at / columns) as u64, at % columns);
        let (now, later) = left.split_at_mut(left.len().min(columns - column));
        at += now.len();
        left = later;
        // Columns 2i and 2i + 1 come together.
        let (odd, even) = now.split_at_mut((column % 2).min(now.len()));
        for value in odd {
            *value = scale(stream.normal(row, column));
        }
        let first = column.next_multiple_of(2);
        for (pair, values) in even.chunks_mut(2).enumerate() {
            let normals = stream.normal_pair(row, first + 2 * pair);
            for (value, normal) in values.iter_mut().zip(normals) {
                *value = scale(normal);
            }
        }
    }
}

/// Elements of a row.
fn columns(parameter: &Parameter) -> usize {
    parameter.shape.get(1).copied().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::Split;
    use crate::part::Place;

    #[test]
    fn values_follow_from_their_place_alone() {
        let parameter = Parameter {
            names: vec!["w".into()],
            shape: vec![301, 777],
            initial: Initial::Normal(0.02),
            split: Split::Whole,
        };
        let values = initial_values(&parameter, 5, 9);
        let stream = Stream::new(9, Purpose::Init, 5, 0);
        for (row, column) in [(0, 0), (0, 776), (150, 3), (300, 776)] {
            assert_eq!(values[row * 777 + column], (stream.normal(row as u64, column) as f64 * 0.02) as f32);
        }
        let std = (values.iter().map(|v| (*v as f64).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        assert!((std / 0.02 - 1.0).abs() < 0.01, "{std}");
        // An odd number of columns, so that parts begin with either of a pair.
        for (split, parts) in [(Split::Rows, 7), (Split::Columns, 3), (Split::Whole, 2)] {
            let parameter = Parameter { split, ..parameter.clone() };
            for (tensor, shard) in [(0, 0), (parts - 1, 1), (parts - 1, 4)] {
                let tensor = Place { rank: tensor, of: parts };
                let held = Held::new(
                    parameter.clone(),
                    5,
                    Part { tensor, shard: Place { rank: shard, of: 5 }, ..Part::WHOLE },
                );
                let shard = initial_shard(&held, 9, Some(3));
                assert_eq!(shard.len(), held.shard_len);
                for (at, start, len) in held.pieces() {
                    assert_eq!(shard[at..at + len], values[start..start + len], "{split:?}");
                }
                assert!(shard[held.shard.len()..].iter().all(|v| *v == 0.0));
            }
        }
        assert_ne!(values, initial_values(&parameter, 5, 10));
        assert_ne!(values, initial_values(&parameter, 6, 9));
    }
}
