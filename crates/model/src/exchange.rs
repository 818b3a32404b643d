//! What the parts of a tensor-parallel model tell each other between operations (Shoeybi et al., 2019, "Megatron-LM";
//! with sequence parallelism: Korthikanti et al., 2022).
//!
//! Between blocks each part has its own rows of all tokens: residual stream, layer norms, dropout. In front of a product whose
//! output is divided the rows of all parts are gathered; behind one whose input is divided the parts' shares are added up,
//! and each keeps its rows.

use crate::weights::Linear;
use anyhow::{Context, Result};
use ferropt_device::{Activation, Combine, Device, Dropout, Element, LinearShape};
use ferropt_mesh::{Group, Label};

/// The parts of a model, and buffers for what goes between them: `[N, width]`, all rows.
pub(crate) struct Exchange<D: Device, E: Element> {
    group: Group,
    /// Elements of this part's rows.
    own: usize,
    gathered: D::Buf<E>,
    partial: D::Buf<E>,
}

impl<D: Device, E: Element> Exchange<D, E> {
    /// Between the parts of `group`, of rows that are `own` elements together in each.
    pub(crate) fn new(group: &Group, own: usize, gathered: D::Buf<E>, partial: D::Buf<E>) -> Self {
        Exchange { group: group.clone(), own, gathered, partial }
    }

    /// All rows, given this part's.
    pub(crate) fn gather(&mut self, device: &D, label: Label, own: &D::Buf<E>) -> Result<&D::Buf<E>> {
        let mut buffer = std::mem::replace(&mut self.gathered, device.alloc(0)?);
        device.copy(self.own, own, 0, &mut buffer, self.group.rank() * self.own);
        self.gathered = self.group.all_gather(label, buffer).wait()?;
        Ok(&self.gathered)
    }

    /// Where this part's share of a sum is to be written, all rows.
    pub(crate) fn partial(&mut self) -> &mut D::Buf<E> {
        &mut self.partial
    }

    /// This part's rows of the sum of all shares.
    pub(crate) fn scatter(&mut self, device: &D, label: Label, own: &mut D::Buf<E>) -> Result<()> {
        let buffer = std::mem::replace(&mut self.partial, device.alloc(0)?);
        self.partial = self.group.reduce_scatter(label, buffer).wait()?;
        device.copy(self.own, &self.partial, self.group.rank() * self.own, own, 0);
        Ok(())
    }

    /// Whether what all parts know alike is this part's to add.
    pub(crate) fn speaks(&self) -> bool {
        self.group.rank() == 0
    }
}

/// All rows of what this part has `own` of.
pub(crate) fn all_rows<'a, D: Device, E: Element>(
    exchange: &'a mut Option<Exchange<D, E>>,
    device: &D,
    label: Label,
    own: &'a D::Buf<E>,
) -> Result<&'a D::Buf<E>> {
    match exchange {
        None => Ok(own),
        Some(exchange) => exchange.gather(device, label, own),
    }
}

/// All rows of what this part has `own` of, and where a share of a sum over all parts is to be written, before [`sum_rows`].
#[allow(clippy::type_complexity)] // a pair of buffers is plainer than a name for it
pub(crate) fn rows_and_share<'a, D: Device, E: Element>(
    exchange: &'a mut Option<Exchange<D, E>>,
    device: &D,
    label: Label,
    own: &'a D::Buf<E>,
    sum: &'a mut D::Buf<E>,
) -> Result<(&'a D::Buf<E>, &'a mut D::Buf<E>)> {
    match exchange {
        None => Ok((own, sum)),
        Some(exchange) => {
            exchange.gather(device, label, own)?;
            Ok((&exchange.gathered, &mut exchange.partial))
        }
    }
}

/// Where a product writes that is a share of a sum over all parts, before [`sum_rows`].
pub(crate) fn share<'a, D: Device, E: Element>(
    exchange: &'a mut Option<Exchange<D, E>>,
    own: &'a mut D::Buf<E>,
) -> &'a mut D::Buf<E> {
    match exchange {
        None => own,
        Some(exchange) => exchange.partial(),
    }
}

/// Turns the shares in [`share`] into this part's rows of their sum, in `own`.
pub(crate) fn sum_rows<D: Device, E: Element>(
    exchange: &mut Option<Exchange<D, E>>,
    device: &D,
    label: Label,
    own: &mut D::Buf<E>,
) -> Result<()> {
    match exchange {
        None => Ok(()),
        Some(exchange) => exchange.scatter(device, label, own),
    }
}

/// `out = residual + dropout(x * w^T + b)` for this part's `rows` rows, where `x` is all rows of a divided width. `branch` is
/// a place for what is added.
pub(crate) fn linear_residual<D: Device, E: Element>(
    exchange: &mut Option<Exchange<D, E>>,
    device: &D,
    label: Label,
    s: LinearShape,
    rows: usize,
    x: &D::Buf<E>,
    w: &Linear<D, E>,
    dropout: Option<Dropout>,
    branch: &mut D::Buf<E>,
    residual: &D::Buf<f32>,
    out: &mut D::Buf<f32>,
) -> Result<()> {
    let Linear { weight, bias } = w;
    let Some(exchange) = exchange else {
        device.linear_residual(s, x, weight, Some(bias), dropout, residual, out);
        return Ok(());
    };
    device.linear(s, x, weight, None, Activation::Identity, exchange.partial());
    exchange.scatter(device, label, branch)?;
    device.residual(rows, s.n, branch, Some(bias), dropout, residual, out);
    Ok(())
}

/// Runs `loss` with the [`Combine`] that puts the vocabulary's parts together, or with none if it is in one piece.
pub(crate) fn with_parts(group: &Group, loss: impl FnOnce(Option<&mut Combine<'_>>)) -> Result<()> {
    if group.size() == 1 {
        loss(None);
        return Ok(());
    }
    let mut failed = Ok(());
    loss(Some(&mut |sums: &mut [f32], logits: &mut [f32]| {
        if failed.is_ok() {
            failed = combine(group, sums, logits);
        }
    }));
    failed
}

/// Log-sum-exps of all parts, and the targets' logits, which are in one of them.
fn combine(group: &Group, sums: &mut [f32], logits: &mut [f32]) -> Result<()> {
    let mine: Vec<f64> = sums.iter().chain(logits.iter()).map(|x| *x as f64).collect();
    let parts = group.gather_f64(Label::new("loss"), &mine)?;
    let rows = sums.len();
    for (row, (sum, logit)) in sums.iter_mut().zip(logits).enumerate() {
        let known = |part: &Vec<f64>| Some((*part.get(row)?, *part.get(rows + row)?));
        let known: Option<Vec<(f64, f64)>> = parts.iter().map(known).collect();
        let known = known.context("a part of the vocabulary has other rows")?;
        let most = known.iter().map(|k| k.0).fold(f64::NEG_INFINITY, f64::max);
        *sum = (most + known.iter().map(|k| (k.0 - most).exp()).sum::<f64>().ln()) as f32;
        *logit = known.iter().map(|k| k.1).sum::<f64>() as f32;
    }
    Ok(())
}
