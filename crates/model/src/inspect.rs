//! Looking into a training pass: tensors as soon as they are written, for whoever searches the first that is wrong.

use crate::ends::Ends;
use crate::layer::{Layers, Sizes};
use crate::part::Held;
use crate::weights::{Layer, Linear, Norm, Weights};
use ferropt_device::{Buffer, Device, Element};

/// What a tensor of a pass is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Computed on the way forward; a row is a token of the micro-batch.
    Activation,
    /// Gradient of an activation; a row is a token of the micro-batch.
    Gradient,
    /// Gradient of a weight: of this process's tensor-parallel part of it.
    WeightGradient,
}

/// A tensor that a pass has just written.
pub struct Written<'a, D: Device, E: Element> {
    /// What it is.
    pub role: Role,
    /// The activation's name in the activation table, or the end of the weight's first name; see [`Written::parameter`].
    /// Gradients bear the name of what they are the gradient of.
    pub name: &'static str,
    /// Layer, where it belongs to one.
    pub layer: Option<usize>,
    /// Number of its first row in the micro-batch: between blocks, a tensor-parallel part has some of the rows.
    pub first_row: usize,
    /// Elements in a row.
    pub width: usize,
    /// Its values.
    pub values: Values<'a, D, E>,
}

/// A buffer of the compute type or of f32.
pub enum Values<'a, D: Device, E: Element> {
    /// Compute type.
    Compute(&'a D::Buf<E>),
    /// f32.
    F32(&'a D::Buf<f32>),
}

impl<D: Device, E: Element> Written<'_, D, E> {
    /// Of the gradient of a weight, the parameter that it belongs to.
    pub fn parameter<'h>(&self, held: &'h [Held]) -> Option<&'h Held> {
        let named = |held: &Held| held.parameter.names.first().is_some_and(|name| name.ends_with(self.name));
        let mut of_layer = held.iter().filter(|held| held.parameter.layer() == self.layer);
        of_layer.find(|held| self.role == Role::WeightGradient && named(held))
    }

    /// Of an activation or its gradient, with the number of its first row.
    fn of_rows(self, sizes: &Sizes) -> Self {
        let elements = match self.values {
            Values::Compute(buffer) => buffer.len(),
            Values::F32(buffer) => buffer.len(),
        };
        let some = self.role != Role::WeightGradient && elements < sizes.all_rows() * self.width;
        Written { first_row: if some { sizes.first_row } else { 0 }, ..self }
    }
}

/// Told of every tensor in the order in which they are computed, or nobody.
pub(crate) type Observer<'a, D, E> = Option<&'a mut dyn FnMut(Written<'_, D, E>)>;

/// Tells an observer, if there is one; what a list would hold is looked up only then.
pub(crate) fn tell<'b, D: Device, E: Element>(
    observer: &mut Observer<'_, D, E>,
    written: impl FnOnce() -> Vec<Written<'b, D, E>>,
) {
    if let Some(observer) = observer {
        written().into_iter().for_each(observer);
    }
}

pub(crate) fn compute<'a, D: Device, E: Element>(
    role: Role,
    name: &'static str,
    width: usize,
    buffer: &'a D::Buf<E>,
) -> Written<'a, D, E> {
    Written { role, name, layer: None, first_row: 0, width, values: Values::Compute(buffer) }
}

pub(crate) fn wide<'a, D: Device, E: Element>(
    role: Role,
    name: &'static str,
    width: usize,
    buffer: &'a D::Buf<f32>,
) -> Written<'a, D, E> {
    Written { role, name, layer: None, first_row: 0, width, values: Values::F32(buffer) }
}

fn linear<'a, D: Device, E: Element>(
    [weight, bias]: [&'static str; 2],
    inputs: usize,
    g: &'a Linear<D, f32>,
) -> [Written<'a, D, E>; 2] {
    let role = Role::WeightGradient;
    [wide(role, weight, inputs, &g.weight), wide(role, bias, 1, &g.bias)]
}

fn norm<'a, D: Device, E: Element>(
    [gain, bias]: [&'static str; 2],
    g: &'a Norm<D>,
) -> [Written<'a, D, E>; 2] {
    let role = Role::WeightGradient;
    [wide(role, gain, 1, &g.gain), wide(role, bias, 1, &g.bias)]
}

impl<D: Device, E: Element> Ends<D, E> {
    /// What was written between the layers and the LM head.
    pub(crate) fn written_forward<'a>(&'a self, layers: &'a Layers<D, E>) -> Vec<Written<'a, D, E>> {
        let projected =
            self.projections.iter().map(|p| ("projected", self.config.embedding_width, &p.projected));
        let list = [("hidden", self.config.width, &layers.hidden)].into_iter().chain(projected);
        let list = list.map(|(name, width, values)| compute(Role::Activation, name, width, values));
        list.map(|written| written.of_rows(&layers.sizes)).collect()
    }

    /// What was written once the gradient has passed the LM head.
    pub(crate) fn written_head<'a>(
        &'a self,
        g: &'a Weights<D, f32>,
        layers: &'a Layers<D, E>,
    ) -> Vec<Written<'a, D, E>> {
        let (role, width) = (Role::WeightGradient, self.config.width);
        let mut list = vec![
            wide(Role::Activation, "losses", 1, &self.losses),
            wide(role, "embed_tokens.weight", self.config.embedding_width, &g.tokens),
        ];
        list.extend(g.project_out.iter().map(|g| wide(role, "project_out.weight", width, g)));
        list.extend(
            g.final_norm.iter().flat_map(|g| norm(["final_layer_norm.weight", "final_layer_norm.bias"], g)),
        );
        list.push(wide(Role::Gradient, "stream", width, &layers.gradients.d_stream));
        list.into_iter().map(|written| written.of_rows(&layers.sizes)).collect()
    }

    /// What was written last.
    pub(crate) fn written_backward<'a>(&self, g: &'a Weights<D, f32>) -> Vec<Written<'a, D, E>> {
        let (role, width, narrow) = (Role::WeightGradient, self.config.width, self.config.embedding_width);
        let mut list = vec![
            wide(role, "embed_tokens.weight", narrow, &g.tokens),
            wide(role, "embed_positions.weight", width, &g.positions),
        ];
        list.extend(g.project_in.iter().map(|g| wide(role, "project_in.weight", narrow, g)));
        list
    }
}

impl<D: Device, E: Element> Layers<D, E> {
    /// What the first layer reads.
    pub(crate) fn written_first(&self) -> Vec<Written<'_, D, E>> {
        let stream = wide(Role::Activation, "stream", self.sizes.width, &self.stream[0]);
        vec![stream.of_rows(&self.sizes)]
    }

    /// What layer `l` wrote on the way forward.
    pub(crate) fn written_forward(&self, l: usize) -> Vec<Written<'_, D, E>> {
        let (s, c, last) = (self.sizes, self.sizes.width, l + 1 == self.sizes.layers);
        let a = Role::Activation;
        let mut list = Vec::new();
        if self.post.is_none() {
            list.push(compute(a, "normed1", c, &self.normed1[l]));
        }
        list.extend([
            compute(a, "qkv", s.qkv.n, &self.qkv[l]),
            compute(a, "attended", s.out.k, &self.attended[l]),
            wide(a, "mid", c, &self.mid[l]),
            compute(a, "normed2", c, &self.normed2[l]),
            compute(a, "relu", s.fc1.n, &self.relu[l]),
        ]);
        match &self.post {
            None => list.push(wide(a, "stream", c, &self.stream[l + 1])),
            Some(post) => {
                list.push(wide(a, "sum2", c, &post.sum2[l]));
                list.push(if last {
                    compute(a, "hidden", c, &self.hidden)
                } else {
                    wide(a, "stream", c, &self.stream[l + 1])
                });
            }
        }
        let layer = Some(self.sizes.first_layer + l);
        list.into_iter().map(|written| Written { layer, ..written.of_rows(&self.sizes) }).collect()
    }

    /// What layer `l` wrote on the way back, `g` being the gradients of its weights.
    pub(crate) fn written_backward<'a>(&'a self, g: &'a Layer<D, f32>, l: usize) -> Vec<Written<'a, D, E>> {
        let (s, c, d) = (self.sizes, self.sizes.width, &self.gradients);
        let role = Role::Gradient;
        let mut list = Vec::new();
        list.extend(linear(["fc2.weight", "fc2.bias"], s.fc2.k, &g.fc2));
        list.push(compute(role, "relu", s.fc1.n, &d.d_relu));
        list.extend(linear(["fc1.weight", "fc1.bias"], c, &g.fc1));
        list.extend(norm(["final_layer_norm.weight", "final_layer_norm.bias"], &g.norm2));
        list.extend(linear(["out_proj.weight", "out_proj.bias"], s.out.k, &g.out));
        list.push(compute(role, "attended", s.out.k, &d.d_attended));
        list.push(compute(role, "qkv", s.qkv.n, &d.d_qkv));
        list.extend(linear(["q_proj.weight", "q_proj.bias"], c, &g.qkv));
        list.push(compute(role, "normed1", c, &d.d_normed));
        list.extend(norm(["self_attn_layer_norm.weight", "self_attn_layer_norm.bias"], &g.norm1));
        list.push(wide(role, "stream", c, &d.d_stream));
        let layer = Some(self.sizes.first_layer + l);
        list.into_iter().map(|written| Written { layer, ..written.of_rows(&self.sizes) }).collect()
    }
}
