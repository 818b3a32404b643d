//! Sums of a step's gradients over ranks that hold the same weights: of what all tensor-parallel parts have over those, of the
//! embedding table over the first and the last stage, and of everything over replicas, one after the other.
//!
//! The sum of a layer begins when its gradients are complete on this rank, and goes on whenever those of the next layers are:
//! beside what is computed meanwhile. Its tensors are summed together, since starting an exchange between GPUs takes
//! the processor long. All ranks begin and go on at the same places of a pass, so that they do so in the same order.

use crate::part::Held;
use crate::weights::{TensorMut, Weights};
use anyhow::Result;
use ferropt_device::Device;
use ferropt_mesh::{Group, Label, Mesh, Pending};
use std::ops::Range;

/// Sums that are under way.
pub(crate) struct Sums<D: Device> {
    over: Vec<Over>,
    layers: Range<usize>,
    /// Layers from this one on have begun.
    begun: usize,
    under_way: Vec<Summing<D>>,
}

/// Ranks that sum, and what: places of tensors in the lists of a layer and of the ends.
struct Over {
    group: Group,
    of_layer: Vec<usize>,
    of_ends: Vec<usize>,
}

/// A unit whose gradients are being summed.
struct Summing<D: Device> {
    /// Which layer, or the ends.
    layer: Option<usize>,
    /// Which groups have not begun yet.
    next: usize,
    /// Whether the first half of the sum is over.
    halfway: bool,
    /// Places in the unit's list, and what is on its way; those buffers are empty meanwhile.
    coming: Vec<(usize, Pending<D::Buf<f32>>)>,
}

impl<D: Device> Sums<D> {
    /// Of a rank that has these layers, and `held` of every parameter.
    pub(crate) fn new(mesh: &Mesh, held: &[Held], layers: Range<usize>) -> Self {
        let over = |group: &Group, which: &dyn Fn(&Held) -> bool| {
            let places = |layer: Option<usize>| {
                let unit = held.iter().filter(|h| h.parameter.layer() == layer).enumerate();
                unit.filter(|(_, h)| h.shard_len > 0 && which(h)).map(|(place, _)| place).collect()
            };
            Over { group: group.clone(), of_layer: places(Some(layers.start)), of_ends: places(None) }
        };
        // Of what all tensor-parallel parts have, each has the gradient of its own rows.
        let mut all = vec![over(&mesh.tensor, &Held::is_whole)];
        // Both ends have the embedding table, which comes first.
        all.extend(mesh.ends.as_ref().map(|ends| over(ends, &|h| h.index == 0)));
        all.push(over(&mesh.replicate, &|_| true));
        all.retain(|over| over.group.size() > 1);
        Sums { over: all, begun: layers.end, layers, under_way: Vec::new() }
    }

    /// The gradients of the layers from `from` on are complete on this rank: begins their sums, and goes on with those that had
    /// begun.
    pub(crate) fn follow(&mut self, device: &D, gradients: &mut Weights<D, f32>, from: usize) -> Result<()> {
        // The new ones first: they are on their way while others are waited for.
        let before = self.under_way.len();
        while self.begun > from {
            self.begun -= 1;
            self.begin(device, gradients, Some(self.begun))?;
        }
        self.go_on(device, gradients, before)
    }

    /// All gradients are complete on this rank: completes all sums.
    pub(crate) fn finish(&mut self, device: &D, gradients: &mut Weights<D, f32>) -> Result<()> {
        self.follow(device, gradients, self.layers.start)?;
        self.begin(device, gradients, None)?;
        while !self.under_way.is_empty() {
            self.go_on(device, gradients, self.under_way.len())?;
        }
        self.begun = self.layers.end;
        Ok(())
    }

    fn begin(&mut self, device: &D, gradients: &mut Weights<D, f32>, layer: Option<usize>) -> Result<()> {
        let mut summing = Summing { layer, next: 0, halfway: false, coming: Vec::new() };
        if summing.start(device, &self.over, gradients)? {
            self.under_way.push(summing);
        }
        Ok(())
    }

    /// Goes on with the first so many.
    fn go_on(&mut self, device: &D, gradients: &mut Weights<D, f32>, count: usize) -> Result<()> {
        for (number, mut summing) in std::mem::take(&mut self.under_way).into_iter().enumerate() {
            if number >= count || summing.go_on(device, &self.over, gradients)? {
                self.under_way.push(summing);
            }
        }
        Ok(())
    }
}

impl<D: Device> Summing<D> {
    /// Starts the sum over the next group that sums something of it; false if there is none.
    fn start(&mut self, device: &D, over: &[Over], gradients: &mut Weights<D, f32>) -> Result<bool> {
        while let Some(Over { group, of_layer, of_ends }) = over.get(self.next) {
            self.next += 1;
            let (places, label) = match self.layer {
                Some(l) => (of_layer, Label::of("layer", l)),
                None => (of_ends, Label::new("ends")),
            };
            if places.is_empty() {
                continue;
            }
            let mut together = group.together();
            for (place, tensor) in self.tensors(gradients).into_iter().enumerate() {
                if places.contains(&place) {
                    let buffer = std::mem::replace(tensor.flat(), device.alloc(0)?);
                    self.coming.push((place, together.all_reduce(label, buffer)));
                }
            }
            together.start()?;
            return Ok(true);
        }
        Ok(false)
    }

    /// The next half of a sum, or the next sum; false if there is none.
    fn go_on(&mut self, device: &D, over: &[Over], gradients: &mut Weights<D, f32>) -> Result<bool> {
        self.halfway = !self.halfway;
        let coming = std::mem::take(&mut self.coming);
        if self.halfway {
            self.coming = coming.into_iter().map(|(place, sum)| (place, sum.proceed())).collect();
            return Ok(true);
        }
        let mut tensors = self.tensors(gradients);
        // From behind, so that places stay what they are.
        for (place, sum) in coming.into_iter().rev() {
            *tensors.swap_remove(place).flat() = sum.wait()?;
        }
        self.start(device, over, gradients)
    }

    /// The unit's tensors, in the order of the parameter table.
    fn tensors<'a>(&self, gradients: &'a mut Weights<D, f32>) -> Vec<TensorMut<'a, D, f32>> {
        match self.layer {
            Some(l) => gradients.layers[l].tensors_mut(),
            None => gradients.ends_mut(),
        }
    }
}
