//! Tokens that end a text.

use anyhow::{Result, bail};
use ferropt_data::EOS;

/// Most of them: models that have several have two or three.
const MOST: usize = 8;

/// The ids that end a text: `</s>` unless a model has others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    ids: [u32; MOST],
    count: usize,
}

impl Default for Ends {
    fn default() -> Self {
        Ends { ids: [EOS; MOST], count: 1 }
    }
}

impl Ends {
    /// # Errors
    /// When there are none, or more than eight.
    pub fn new(ids: &[u32]) -> Result<Ends> {
        let mut ends = Ends { count: ids.len(), ..Ends::default() };
        match ends.ids.get_mut(..ids.len()) {
            Some(all) if !ids.is_empty() => all.copy_from_slice(ids),
            _ => bail!("{} tokens end a text; from 1 to {MOST} may", ids.len()),
        }
        Ok(ends)
    }

    /// All of them.
    pub fn ids(&self) -> &[u32] {
        &self.ids[..self.count]
    }

    /// The one, if there is one only.
    pub(crate) fn single(&self) -> Option<u32> {
        match self.ids() {
            [id] => Some(*id),
            _ => None,
        }
    }

    /// Whether a text ends with this token.
    pub fn contains(&self, id: u32) -> bool {
        self.ids().contains(&id)
    }

    /// Makes them impossible.
    pub(crate) fn rule_out(&self, logits: &mut [f32]) {
        for id in self.ids() {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}
