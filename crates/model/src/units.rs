//! Fully sharded weights: a unit at a time is whole on the device (Rajbhandari et al., 2020, "ZeRO", stage 3; Zhao et al., 2023,
//! "PyTorch FSDP"). A unit is a layer, or the ends of the model: embeddings, last layer norm and projections.
//!
//! [`Units`] gathers weights: the next layer's come while one computes, into one of two places. What a place holds is kept
//! until it is needed for another layer, so the backward pass begins with the layer that the forward pass ended with, and
//! the next micro-batch with the one that the backward pass ended with. The ends stay for a whole step.
//! [`Totals`] sums gradients over the ranks, a layer's while the one before it computes. Tensors of a unit are exchanged
//! together, since starting an exchange between GPUs takes the processor long.
//!
//! Where weights and sums of gradients are in the host's memory ([`Offload::All`]), shards are copied from there and sums back,
//! beside what computes; to a single rank the same happens without the others. A single rank without that has all of them
//! where they are, and nothing happens here.

use crate::backprop::Task;
use crate::config::Config;
use crate::offload::Offload;
use crate::part::Held;
use crate::weights::{Layer, Tensor, TensorMut, Weights, Zeros};
use anyhow::Result;
use ferropt_device::{Buffer, Device, Element, Lane, Store, Transfer};
use ferropt_mesh::{Group, Label, Pending, Together};

/// Layers that are whole at once: one computes, another is on its way.
const PLACES: usize = 2;

/// Layers that are whole at once, with their gradients, where so many ranks share them out.
pub fn layers_at_once(ranks: usize, offload: Offload) -> usize {
    if ranks == 1 && !offload.has_weights() { 0 } else { PLACES }
}

/// Weights as passes read them.
pub(crate) struct Units<D: Device, E: Element>(Option<Gathered<D, E>>);

struct Gathered<D: Device, E: Element> {
    group: Group,
    kept: Kept,
    places: Vec<Gathering<Layer<D, E>, D, E>>,
    ends: Gathering<Weights<D, E>, D, E>,
}

/// Which layer each place has.
#[derive(Clone, Copy, Debug, Default)]
struct Kept([Option<usize>; PLACES]);

impl Kept {
    /// Which layers go where, so that `l` and `next` are there.
    fn ask(&mut self, l: usize, next: Option<usize>) -> impl Iterator<Item = (usize, usize)> + use<> {
        let mut moves = [None; 2];
        for (wanted, moved) in [Some(l), next].into_iter().flatten().zip(&mut moves) {
            let free = |held: &Option<usize>| held.is_none_or(|held| held != l && Some(held) != next);
            if !self.0.contains(&Some(wanted))
                && let Some(place) = self.0.iter().position(free)
            {
                self.0[place] = Some(wanted);
                *moved = Some((place, wanted));
            }
        }
        moves.into_iter().flatten()
    }
}

/// How many layers a rank gathers in a step whose passes go through `layers` layers in this order, where ranks share them out.
pub fn gathers(tasks: &[Task], layers: usize) -> u64 {
    let mut kept = Kept::default();
    let mut count = 0;
    for task in tasks {
        match task {
            Task::Forward(_) => {
                for l in 0..layers {
                    count += kept.ask(l, Some(l + 1).filter(|next| *next < layers)).count();
                }
            }
            Task::Backward(_) => {
                for l in (0..layers).rev() {
                    count += kept.ask(l, l.checked_sub(1)).count();
                }
            }
        }
    }
    count as u64
}

/// A unit that is whole, or on its way.
struct Gathering<U, D: Device, E: Element> {
    unit: U,
    /// Whether it is what its place is said to have.
    good: bool,
    /// What is on its way; those buffers of the unit are empty meanwhile.
    coming: Vec<Coming<D, E>>,
    /// What else its content waits for.
    moving: Option<Box<dyn Transfer>>,
}

enum Coming<D: Device, E: Element> {
    Matrix(Pending<D::Buf<E>>),
    Vector(Pending<D::Buf<f32>>),
}

/// Lists of buffers in the order of the parameter table.
trait Unit<D: Device, E: Element> {
    fn list(&self) -> Vec<Tensor<'_, D, E>>;
    fn list_mut(&mut self) -> Vec<TensorMut<'_, D, E>>;
}

impl<D: Device, E: Element> Unit<D, E> for Layer<D, E> {
    fn list(&self) -> Vec<Tensor<'_, D, E>> {
        self.tensors()
    }

    fn list_mut(&mut self) -> Vec<TensorMut<'_, D, E>> {
        self.tensors_mut()
    }
}

/// Of weights, the ends.
impl<D: Device, E: Element> Unit<D, E> for Weights<D, E> {
    fn list(&self) -> Vec<Tensor<'_, D, E>> {
        self.ends()
    }

    fn list_mut(&mut self) -> Vec<TensorMut<'_, D, E>> {
        self.ends_mut()
    }
}

/// Lengths of whole units' buffers.
struct Lengths {
    layer: Vec<usize>,
    ends: Vec<usize>,
}

impl Lengths {
    fn new(held: &[Held], shards: usize) -> Lengths {
        let length = |h: &Held| h.shard_len * shards;
        // Those of any layer that is held here.
        let layer = held.iter().filter(|h| h.shard_len > 0).find_map(|h| h.parameter.layer());
        Lengths {
            layer: held
                .iter()
                .filter(|h| layer.is_some() && h.parameter.layer() == layer)
                .map(length)
                .collect(),
            ends: held.iter().filter(|h| h.parameter.layer().is_none()).map(length).collect(),
        }
    }

    fn layer<D: Device, E: Element>(&self, device: &D) -> Result<Layer<D, E>> {
        Layer::make(&mut Zeros { device, offload: Offload::None, lengths: &mut self.layer.iter().copied() })
    }

    fn ends<D: Device, E: Element>(&self, device: &D, config: &Config) -> Result<Weights<D, E>> {
        let lengths = &mut self.ends.iter().copied();
        Weights::make(config, 0, &mut Zeros { device, offload: Offload::None, lengths })
    }
}

impl<D: Device, E: Element> Units<D, E> {
    /// Room for whole units, where weights are shared out among the ranks of `group` or are in the host's memory.
    pub(crate) fn new(
        device: &D,
        config: &Config,
        held: &[Held],
        group: &Group,
        offload: Offload,
    ) -> Result<Self> {
        let places = layers_at_once(group.size(), offload);
        if places == 0 {
            return Ok(Units(None));
        }
        let lengths = Lengths::new(held, group.size());
        let place = |_| lengths.layer(device).map(Gathering::new);
        let places = (0..places).map(place).collect::<Result<_>>()?;
        let ends = Gathering::new(lengths.ends(device, config)?);
        Ok(Units(Some(Gathered { group: group.clone(), kept: Kept::default(), places, ends })))
    }

    /// The weights have changed: nothing that is here is good any more.
    pub(crate) fn forget(&mut self) {
        if let Some(gathered) = &mut self.0 {
            gathered.ends.good = false;
            gathered.kept = Kept::default();
        }
    }

    /// Asks for layer `l`, which is about to be used, and for the one after it.
    pub(crate) fn ask(&mut self, device: &D, w: &Weights<D, E>, l: usize, next: Option<usize>) -> Result<()> {
        let Some(Gathered { group, kept, places, .. }) = &mut self.0 else { return Ok(()) };
        for (place, wanted) in kept.ask(l, next) {
            places[place].start(device, group, Label::of("layer", wanted), &w.layers[wanted])?;
        }
        Ok(())
    }

    /// Layer `l`, which was asked for.
    pub(crate) fn layer<'a>(&'a mut self, w: &'a Weights<D, E>, l: usize) -> Result<&'a Layer<D, E>> {
        let Some(Gathered { kept, places, .. }) = &mut self.0 else { return Ok(&w.layers[l]) };
        match kept.0.iter().position(|held| *held == Some(l)) {
            Some(place) => places[place].arrive(),
            None => anyhow::bail!("layer {l} was not asked for"),
        }
    }

    /// The ends. Of those that were gathered, `layers` is empty.
    pub(crate) fn ends<'a>(&'a mut self, device: &D, w: &'a Weights<D, E>) -> Result<&'a Weights<D, E>> {
        let Some(Gathered { group, ends, .. }) = &mut self.0 else { return Ok(w) };
        if !ends.good {
            ends.start(device, group, Label::new("ends"), w)?;
        }
        ends.arrive()
    }
}

impl<U: Unit<D, E>, D: Device, E: Element> Gathering<U, D, E> {
    fn new(unit: U) -> Self {
        Gathering { unit, good: false, coming: Vec::new(), moving: None }
    }

    /// Gathers the unit of `shards`.
    fn start(&mut self, device: &D, group: &Group, label: Label, shards: &impl Unit<D, E>) -> Result<()> {
        // What was on its way and has not been used, if anything, has to be here before its buffers can be.
        self.arrive()?;
        self.good = true;
        let mut started = Ok(());
        let moving = device.beside(Lane::In, &mut || started = self.fetch(device, group, label, shards));
        self.moving = moving;
        started
    }

    /// Copies a rank's own shard, and has the others send theirs.
    fn fetch(&mut self, device: &D, group: &Group, label: Label, shards: &impl Unit<D, E>) -> Result<()> {
        let (mut together, rank) = (group.together(), group.rank());
        for (shard, whole) in shards.list().into_iter().zip(self.unit.list_mut()) {
            self.coming.push(match (shard, whole) {
                (Tensor::Matrix(shard), TensorMut::Matrix(whole)) => {
                    Coming::Matrix(gather(device, &mut together, rank, label, shard, whole)?)
                }
                (Tensor::Vector(shard), TensorMut::Vector(whole)) => {
                    Coming::Vector(gather(device, &mut together, rank, label, shard, whole)?)
                }
                _ => anyhow::bail!("the {label} has a matrix where its shards have a vector"),
            });
        }
        together.start()
    }

    /// The unit, once it is whole.
    fn arrive(&mut self) -> Result<&U> {
        if let Some(moving) = self.moving.take() {
            moving.hold_back();
        }
        for (coming, whole) in self.coming.drain(..).zip(self.unit.list_mut()) {
            match (coming, whole) {
                (Coming::Matrix(coming), TensorMut::Matrix(whole)) => *whole = coming.wait()?,
                (Coming::Vector(coming), TensorMut::Vector(whole)) => *whole = coming.wait()?,
                _ => anyhow::bail!("a matrix came where a vector was sent for"),
            }
        }
        Ok(&self.unit)
    }
}

/// Has a tensor gathered, together with others; `whole` is empty until it is there.
fn gather<D: Device, T: Element>(
    device: &D,
    together: &mut Together<'_>,
    rank: usize,
    label: Label,
    shard: &D::Buf<T>,
    whole: &mut D::Buf<T>,
) -> Result<Pending<D::Buf<T>>> {
    let mut buffer = std::mem::replace(whole, device.alloc(0)?);
    device.copy(shard.len(), shard, 0, &mut buffer, rank * shard.len());
    Ok(together.all_gather(label, buffer))
}

/// Gradients as passes write them, and their sums over the ranks.
pub(crate) struct Totals<D: Device>(Option<Scattered<D>>);

struct Scattered<D: Device> {
    group: Group,
    places: Vec<Scattering<Layer<D, f32>, D>>,
    ends: Scattering<Weights<D, f32>, D>,
    /// The place that is written next.
    next: usize,
}

/// A unit of gradients that is being written, or whose sum is on its way.
struct Scattering<U, D: Device> {
    unit: U,
    /// Whether it is being written.
    open: bool,
    coming: Vec<Pending<D::Buf<f32>>>,
    /// Which layer's it is, and what is to be done with the sum.
    goes: (usize, Store),
    /// What else its buffers wait for before they are written.
    moving: Option<Box<dyn Transfer>>,
}

impl<D: Device> Totals<D> {
    /// Room for whole units, where gradients are shared out among the ranks of `group` or summed in the host's memory.
    pub(crate) fn new(
        device: &D,
        config: &Config,
        held: &[Held],
        group: &Group,
        offload: Offload,
    ) -> Result<Self> {
        let places = layers_at_once(group.size(), offload);
        if places == 0 {
            return Ok(Totals(None));
        }
        let lengths = Lengths::new(held, group.size());
        let place = |_| lengths.layer(device).map(Scattering::new);
        let places = (0..places).map(place).collect::<Result<_>>()?;
        let ends = Scattering::new(lengths.ends(device, config)?);
        Ok(Totals(Some(Scattered { group: group.clone(), places, ends, next: 0 })))
    }

    /// Where layer `l`'s gradients are to be written, and how; those of `next` are written then. `sums` has this rank's shards.
    pub(crate) fn layer<'a>(
        &'a mut self,
        device: &D,
        sums: &'a mut Weights<D, f32>,
        l: usize,
        next: Option<usize>,
        store: Store,
    ) -> Result<(&'a mut Layer<D, f32>, Store)> {
        let Some(scattered) = &mut self.0 else { return Ok((&mut sums.layers[l], store)) };
        let (here, places) = (scattered.next, scattered.places.len());
        scattered.open(device, sums, here, (l, store))?;
        if let Some(next) = next.filter(|_| goes_on(&scattered.group, store)) {
            scattered.open(device, sums, (here + 1) % places, (next, store))?;
        }
        Ok(scattered.places[here].write(&scattered.group, store))
    }

    /// How many layers are written after one before its gradients are complete: where a sum is on its way, it is waited for when
    /// its place is needed again.
    pub(crate) fn behind(&self) -> usize {
        self.0.as_ref().map_or(0, |scattered| scattered.places.len())
    }

    /// They are written.
    pub(crate) fn layer_done(&mut self, device: &D, sums: &mut Weights<D, f32>) -> Result<()> {
        let Some(Scattered { group, places, next, .. }) = &mut self.0 else { return Ok(()) };
        let place = &mut places[*next];
        let l = place.goes.0;
        place.start(device, group, Label::of("layer", l), &mut sums.layers[l])?;
        *next = (*next + 1) % places.len();
        Ok(())
    }

    /// Where the ends' gradients are to be written, and how.
    pub(crate) fn ends<'a>(
        &'a mut self,
        device: &D,
        sums: &'a mut Weights<D, f32>,
        store: Store,
    ) -> Result<(&'a mut Weights<D, f32>, Store)> {
        let Some(Scattered { group, ends, .. }) = &mut self.0 else { return Ok((sums, store)) };
        if !ends.open {
            ends.settle(device, group, sums)?;
            ends.open(device, group, &*sums, (0, store));
        }
        Ok(ends.write(group, store))
    }

    /// They are written.
    pub(crate) fn ends_done(&mut self, device: &D, sums: &mut Weights<D, f32>) -> Result<()> {
        let Some(Scattered { group, ends, .. }) = &mut self.0 else { return Ok(()) };
        ends.start(device, group, Label::new("ends"), sums)
    }

    /// Waits for all sums.
    pub(crate) fn finish(&mut self, device: &D, sums: &mut Weights<D, f32>) -> Result<()> {
        let Some(Scattered { group, places, ends, .. }) = &mut self.0 else { return Ok(()) };
        for place in places {
            let into = place.goes.0;
            place.settle(device, group, &mut sums.layers[into])?;
            place.hold_back();
        }
        ends.settle(device, group, sums)?;
        ends.hold_back();
        Ok(())
    }
}

impl<D: Device> Scattered<D> {
    /// Has a place made ready to be written, if it is not. Of a layer that goes on this may be earlier than it is written.
    fn open(
        &mut self,
        device: &D,
        sums: &mut Weights<D, f32>,
        place: usize,
        goes: (usize, Store),
    ) -> Result<()> {
        let Scattered { group, places, .. } = self;
        if places[place].open {
            return Ok(());
        }
        let into = places[place].goes.0;
        places[place].settle(device, group, &mut sums.layers[into])?;
        if goes_on(group, goes.1) {
            // The layer's sum, which is to be copied, may be on its way from any place.
            device.beside(Lane::In, &mut || {
                places.iter().flat_map(|place| &place.moving).for_each(|moving| moving.hold_back());
            });
        }
        places[place].open(device, group, &sums.layers[goes.0], goes);
        Ok(())
    }
}

/// Whether gradients are added to what was summed before as they are computed: those of a single rank, which have the bits then
/// that they would have if they were not moved.
fn goes_on(group: &Group, store: Store) -> bool {
    group.size() == 1 && store == Store::Accumulate
}

impl<U: Unit<D, f32>, D: Device> Scattering<U, D> {
    fn new(unit: U) -> Self {
        Scattering { unit, open: false, coming: Vec::new(), goes: (0, Store::Overwrite), moving: None }
    }

    /// Makes the unit ready to be written; `sums` has what was summed of it before.
    fn open(&mut self, device: &D, group: &Group, sums: &impl Unit<D, f32>, goes: (usize, Store)) {
        self.open = true;
        self.goes = goes;
        if group.size() == 1 {
            self.goes.1 = Store::Overwrite;
        }
        if goes_on(group, goes.1) {
            let unit = &mut self.unit;
            let moving = self.moving.take();
            self.moving = device.beside(Lane::In, &mut || {
                moving.iter().for_each(|moving| moving.hold_back());
                for (sum, whole) in sums.list().into_iter().zip(unit.list_mut()) {
                    let sum = sum.flat();
                    device.copy(sum.len(), sum, 0, whole.flat(), 0);
                }
            });
        }
    }

    /// The unit, to be written (on, if that has begun), and how.
    fn write(&mut self, group: &Group, store: Store) -> (&mut U, Store) {
        self.hold_back();
        (&mut self.unit, if group.size() == 1 { store } else { Store::Overwrite })
    }

    /// What comes now waits for what its buffers wait for.
    fn hold_back(&mut self) {
        if let Some(moving) = self.moving.take() {
            moving.hold_back();
        }
    }

    /// Has the unit summed over the ranks, and added to the sums; only later where that would keep this thread waiting.
    fn start(&mut self, device: &D, group: &Group, label: Label, sums: &mut impl Unit<D, f32>) -> Result<()> {
        self.open = false;
        let mut together = group.together();
        for whole in self.unit.list_mut() {
            let buffer = std::mem::replace(whole.flat(), device.alloc(0)?);
            self.coming.push(together.reduce_scatter(label, buffer));
        }
        together.start()?;
        match self.coming.iter().any(Pending::keeps_waiting) {
            true => Ok(()),
            false => self.settle(device, group, sums),
        }
    }

    /// Puts the sums that are on their way where they belong.
    fn settle(&mut self, device: &D, group: &Group, into: &mut impl Unit<D, f32>) -> Result<()> {
        if self.coming.is_empty() {
            return Ok(());
        }
        let mut settled = Ok(());
        let moving = device.beside(Lane::Out, &mut || settled = self.add(device, group, into));
        self.moving = moving;
        settled
    }

    fn add(&mut self, device: &D, group: &Group, into: &mut impl Unit<D, f32>) -> Result<()> {
        let tensors = self.unit.list_mut().into_iter().zip(into.list_mut());
        for (coming, (whole, sum)) in self.coming.drain(..).zip(tensors) {
            let (whole, sum) = (whole.flat(), sum.flat());
            *whole = coming.wait()?;
            device.accumulate(whole, group.rank() * sum.len(), sum, self.goes.1);
        }
        Ok(())
    }
}
