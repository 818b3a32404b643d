//! Initial values: a function of (seed, parameter, element), so every layout begins alike.

use crate::parameters::{Initial, Parameter};
use ferropt_device::rng::{Purpose, Stream};
use std::num::NonZero;
use std::thread;

/// Fewer elements than this are not worth a thread.
const PER_THREAD: usize = 1 << 16;

/// Values of parameter number `index` before the first step.
pub fn initial_values(parameter: &Parameter, index: usize, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0f32; parameter.elements()];
    let columns = columns(parameter);
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let rows = parameter.elements() / columns;
    let share = rows.div_ceil(threads).max(PER_THREAD.div_ceil(columns));
    thread::scope(|scope| {
        for (part, values) in values.chunks_mut(share * columns).enumerate() {
            scope.spawn(move || initial_rows(parameter, index, seed, part * share, values));
        }
    });
    values
}

/// Rows of them from `first` on, as many as `values` has room for; a vector's rows are its elements.
pub fn initial_rows(parameter: &Parameter, index: usize, seed: u64, first: usize, values: &mut [f32]) {
    match parameter.initial {
        Initial::Zeros => values.fill(0.0),
        Initial::Ones => values.fill(1.0),
        Initial::Normal(std) => {
            let stream = Stream::new(seed, Purpose::Init, index, 0);
            for (row, values) in values.chunks_mut(columns(parameter)).enumerate() {
                for (pair, values) in values.chunks_mut(2).enumerate() {
                    let normals = stream.normal_pair((first + row) as u64, 2 * pair);
                    for (value, normal) in values.iter_mut().zip(normals) {
                        *value = (normal as f64 * std) as f32;
                    }
                }
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
        assert_ne!(values, initial_values(&parameter, 5, 10));
        assert_ne!(values, initial_values(&parameter, 6, 9));
    }
}
