//! Looking into a pass changes nothing, shows what a pass computes, and finds where it goes wrong.

use super::*;
use ferropt_model::{Role, Values, Written};

/// Role, layer, name and first row of the first tensor that is not finite, and how many tensors were seen.
type Found = (Option<(Role, Option<usize>, &'static str, usize)>, usize);

fn first<E: Element>(
    device: &CpuDevice,
    model: &Model<CpuDevice, E>,
    config: &Config,
    scale: f32,
) -> (Found, Backprop<CpuDevice, E>) {
    let (b, t) = (2, 21);
    let (tokens, targets) = (ids(1, b * t, 61), ids(2, b * t, 61));
    let batch = Batch { tokens: &tokens, targets: &targets, doc_start: &vec![0; b * t] };
    let pass = Pass { seed: 1, step: 3, first_sequence: 0 };
    let mut backprop = Backprop::<_, E>::new(device, config, options(b, t)).unwrap();
    let mut found: Found = (None, 0);
    let mut look = |written: Written<'_, CpuDevice, E>| {
        found.1 += 1;
        let values: Vec<f32> = match written.values {
            Values::Compute(buffer) => {
                let mut values = vec![E::default(); buffer.len()];
                device.download(buffer, 0, &mut values);
                values.into_iter().map(E::to_f32).collect()
            }
            Values::F32(buffer) => {
                let mut values = vec![0.0; buffer.len()];
                device.download(buffer, 0, &mut values);
                values
            }
        };
        assert!(values.len().is_multiple_of(written.width), "{}", written.name);
        let parameter = written.parameter(model.held()).map(|held| held.parameter.elements());
        let expected = (written.role == Role::WeightGradient).then_some(values.len());
        assert_eq!(parameter, expected, "{} of layer {:?}", written.name, written.layer);
        if let (None, Some(place)) = (found.0, values.iter().position(|v| !v.is_finite())) {
            found.0 = Some((written.role, written.layer, written.name, place / written.width));
        }
    };
    backprop.inspect(device, model, batch, pass, scale, &mut look).unwrap();
    (found, backprop)
}

#[test]
fn inspecting_shows_every_layer_and_changes_no_bit() {
    let device = device();
    for config in configs() {
        let config = Config { dropout: 0.2, attention_dropout: 0.3, ..config };
        let model = model::<f32>(&device, &config);
        let ((found, seen), inspected) = first(&device, &model, &config, 1.0);
        assert_eq!(found, None);
        assert!(seen > 40, "{seen} tensors");
        let (b, t) = (2, 21);
        let (tokens, targets) = (ids(1, b * t, 61), ids(2, b * t, 61));
        let batch = Batch { tokens: &tokens, targets: &targets, doc_start: &vec![0; b * t] };
        let mut plain = Backprop::<_, f32>::new(&device, &config, options(b, t)).unwrap();
        let pass = Pass { seed: 1, step: 3, first_sequence: 0 };
        plain.train(&device, &model, batch, pass, 1.0, Store::Overwrite).unwrap();
        assert!(gradients(&device, &plain) == gradients(&device, &inspected));
    }
}

#[test]
fn the_first_tensor_that_is_not_finite_is_the_one_that_was_poisoned() {
    let device = device();
    for config in configs() {
        let place = |end: &str| {
            config.parameters().iter().position(|p| p.names[0].ends_with(end)).expect("a parameter")
        };
        for (name, value, want) in [
            ("layers.1.self_attn.q_proj.bias", f32::NAN, (Some(1), "qkv")),
            ("layers.0.self_attn.out_proj.bias", f32::INFINITY, (Some(0), "mid")),
            ("layers.1.fc1.bias", f32::INFINITY, (Some(1), "relu")),
            ("embed_positions.weight", f32::NAN, (None, "stream")),
        ] {
            let mut model = model::<bf16>(&device, &config);
            let index = place(name);
            let mut poisoned = values(&config.parameters()[index], index);
            let last = poisoned.len() - 1;
            // The position that the last token of a sequence has; of biases, the last element.
            let at = if name.starts_with("embed") { (20 + 2) * config.width } else { last };
            poisoned[at] = value;
            model.set(&device, index, &poisoned).unwrap();
            let ((found, _), _) = first(&device, &model, &config, 1.0);
            let (role, layer, tensor, row) = found.expect("something is not finite");
            assert_eq!((role, (layer, tensor)), (Role::Activation, want), "{name}");
            assert_eq!(row, if layer.is_none() { 20 } else { 0 }, "{name}");
        }
    }
}

#[test]
fn a_gradient_that_overflows_is_told_from_an_activation_that_does() {
    let device = device();
    for config in configs() {
        let model = model::<f32>(&device, &config);
        let ((found, _), _) = first(&device, &model, &config, f32::MAX);
        let (role, ..) = found.expect("something is not finite");
        assert_ne!(role, Role::Activation);
    }
}
