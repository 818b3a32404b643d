//! Reading logits: which token follows, how likely it is, and what else was likely. Many rows are read at once, on all
//! threads.

use crate::adjust::{end_allowed, unchanged};
use crate::ends::Ends;
use crate::parameters::Parameters;
use crate::sampler::{Place, Sampler, draw, top};
use crate::text::Token;
use ferropt_device::Device;
use ferropt_model::Logits;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Memory for reading a row, as much as there are threads, used again for each row.
#[derive(Default)]
pub(crate) struct Scratches(Mutex<Vec<Scratch>>);

#[derive(Default)]
struct Scratch {
    logits: Vec<f32>,
    sampler: Sampler,
}

impl Scratches {
    fn with<R>(&self, work: impl FnOnce(&mut Scratch) -> R) -> R {
        let all = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = all().pop().unwrap_or_default();
        let result = work(&mut scratch);
        all().push(scratch);
        result
    }
}

/// What `task` gives for each number below `count`, computed on all threads.
pub(crate) fn on_all_threads<D: Device, T: Send + Sync>(
    device: &D,
    count: usize,
    task: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let results: Vec<OnceLock<T>> = (0..count).map(|_| OnceLock::new()).collect();
    device.each_task(count, &|number| {
        // Each number comes once.
        let _ = results[number].set(task(number));
    });
    results.into_iter().filter_map(OnceLock::into_inner).collect()
}

/// A token that is to be chosen: behind which row, and how.
pub(crate) struct Asked<'a> {
    pub(crate) row: usize,
    pub(crate) parameters: &'a Parameters,
    pub(crate) place: Place<'a>,
}

/// Reads and chooses from the logits of some rows.
pub(crate) struct Chooser<'a, D: Device> {
    /// Of all rows.
    pub(crate) logits: Logits<'a, D>,
    /// Ids that may be chosen.
    pub(crate) known: usize,
    /// Memory.
    pub(crate) scratches: &'a Scratches,
}

impl<D: Device> Chooser<'_, D> {
    /// The tokens that are asked for. Where logits need not be changed, the device chooses.
    pub(crate) fn pick(&self, device: &D, asked: &[Asked<'_>]) -> Vec<u32> {
        let mut ids = vec![0; asked.len()];
        let (mut drawn, mut draws, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for (i, Asked { row, parameters: p, place }) in asked.iter().enumerate() {
            // A device leaves out one token when it draws.
            let several = place.ends.single().is_none() && !end_allowed(p, place.written());
            if !unchanged(p) || several {
                others.push(i);
            } else if let Some(draw) = draw(p, *place) {
                drawn.push(i);
                draws.push((*row, draw));
            } else {
                let largest = self.logits.largest(*row);
                if end_allowed(p, place.written()) && (largest as usize) < self.known {
                    ids[i] = largest;
                } else {
                    others.push(i);
                }
            }
        }
        for (i, id) in drawn.into_iter().zip(self.logits.draw(self.known, &draws)) {
            ids[i] = id;
        }
        let changed = on_all_threads(device, others.len(), |number| {
            let Asked { row, parameters, place } = &asked[others[number]];
            self.scratches.with(|scratch| {
                self.logits.read(*row, &mut scratch.logits);
                scratch.sampler.pick(parameters, *place, &mut scratch.logits[..self.known])
            })
        });
        for (i, id) in others.iter().zip(changed) {
            ids[*i] = id;
        }
        ids
    }

    /// A token with its log-probability, if `needed` or asked for, and the likeliest ones beside it.
    pub(crate) fn token(&self, row: usize, id: u32, needed: bool, log_probs: Option<usize>) -> Token {
        let log_prob = (needed || log_probs.is_some()).then(|| self.logits.log_prob(row, id));
        Token { id, log_prob, top: self.top(row, log_probs.unwrap_or(0)) }
    }

    fn top(&self, row: usize, count: usize) -> Vec<(u32, f32)> {
        if count <= 1 {
            let largest = self.logits.largest(row);
            return (0..count).map(|_| (largest, self.logits.log_prob(row, largest))).collect();
        }
        let lse = self.logits.log_sum_exp(row);
        self.scratches.with(|Scratch { logits, .. }| {
            self.logits.read(row, logits);
            top(logits, count).into_iter().map(|(id, logit)| (id, logit - lse)).collect()
        })
    }

    /// The likeliest tokens that may be chosen, which `without` may not.
    pub(crate) fn likeliest(
        &self,
        row: usize,
        count: usize,
        without: Option<&Ends>,
        log_probs: Option<usize>,
    ) -> Vec<Token> {
        let beside = self.top(row, log_probs.unwrap_or(0));
        let lse = self.logits.log_sum_exp(row);
        let likeliest = self.scratches.with(|Scratch { logits, .. }| {
            self.logits.read(row, logits);
            let known = &mut logits[..self.known];
            if let Some(ends) = without {
                ends.rule_out(known);
            }
            top(known, count)
        });
        let likeliest = likeliest.into_iter().filter(|(_, logit)| *logit > f32::NEG_INFINITY);
        likeliest.map(|(id, logit)| Token { id, log_prob: Some(logit - lse), top: beside.clone() }).collect()
    }
}
