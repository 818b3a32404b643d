//! On a GPU, a layer's operations are started as graphs, which change no gradient: whatever the step and its random masks,
//! whether gradients are replaced or added to, and whether activations are computed again.

use super::*;
use ferropt_device::cuda::{CudaDevice, CudaOptions};

/// Losses and gradients of three steps of two micro-batches each, and how many graphs were started.
fn steps<E: Element>(config: &Config, recompute: Recompute, graphs: bool) -> (Vec<(f64, Vec<f32>)>, u64) {
    let device = CudaDevice::new(0, CudaOptions { threads: Some(1), graphs: Some(graphs) }).unwrap();
    let mut model: Model<_, E> = Model::zeros(&device, config).unwrap();
    for (i, parameter) in config.parameters().iter().enumerate() {
        model.set(&device, i, &values(parameter, i)).unwrap();
    }
    let (batch, seq) = (2, 21);
    let options = Options { recompute, stop_at_documents: true, ..options(batch, seq) };
    let mut backprop = Backprop::new(&device, config, options).unwrap();
    let mut results = Vec::new();
    for micro in 0..6 {
        let (tokens, targets) = (ids(micro, batch * seq, 61), ids(micro + 9, batch * seq, 61));
        let doc_start = vec![0; batch * seq];
        let given = Batch { tokens: &tokens, targets: &targets, doc_start: &doc_start };
        let (step, first_sequence) = (micro as u64 / 2, (micro % 2 * batch) as u64);
        let store = if first_sequence == 0 { Store::Overwrite } else { Store::Accumulate };
        let pass = Pass { seed: 3, step, first_sequence };
        let loss = backprop.train(&device, &model, given, pass, 0.25, store).unwrap();
        let mut gradients = Vec::new();
        for tensor in backprop.gradients.tensors() {
            let gradient = tensor.flat();
            let mut values = vec![0.0; gradient.len()];
            device.download(gradient, 0, &mut values);
            gradients.extend(values);
        }
        results.push((loss, gradients));
    }
    (results, device.graphs_started())
}

fn check<E: Element>(config: &Config, recompute: Recompute) {
    let (want, none) = steps::<E>(config, recompute, false);
    let (got, started) = steps::<E>(config, recompute, true);
    assert_eq!(none, 0);
    // Of each layer three sequences: forward passes, backward passes that replace gradients, and those that add to them. Each is
    // met once before it is a graph, and again where workspace grew meanwhile.
    let (all, sequences) = (2 * 2 * 6, 2 * 3);
    assert!((all - 2 * sequences..=all - sequences).contains(&started), "{started} graphs were started");
    for (micro, ((loss, gradients), (want_loss, want))) in got.iter().zip(&want).enumerate() {
        assert!(want.iter().all(|g| g.is_finite()) && want.iter().any(|g| *g != 0.0));
        let differ = gradients.iter().zip(want).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        assert!(loss == want_loss && differ == 0, "micro-batch {micro}: {differ} gradients differ");
    }
}

#[test]
#[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
fn graphs_change_no_gradient() {
    for config in configs() {
        for dropout in [0.0, 0.1] {
            let config = Config { dropout, attention_dropout: dropout, ..config.clone() };
            check::<f32>(&config, Recompute::None);
            check::<bf16>(&config, Recompute::Full);
        }
    }
}
