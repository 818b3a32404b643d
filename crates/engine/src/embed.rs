//! Texts as vectors: what the model makes of a text's tokens, brought together.

use ferropt_data::EOS;

/// How the hidden states of a text's tokens become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean. That of a `</s>` in front is left out, as it is the same whatever follows.
    Mean,
    /// The last one alone, which has seen all others.
    Last,
}

impl Pooling {
    /// Name for programs.
    pub fn name(self) -> &'static str {
        match self {
            Pooling::Mean => "mean",
            Pooling::Last => "last",
        }
    }
}

/// A text's vector as far as its tokens are computed. Tokens are added in their order, so that the sums have the same bits
/// however the text is cut, and also when it has to be computed again.
pub(crate) struct Pool {
    /// The next token whose hidden state is wanted, and the text's length.
    next: usize,
    end: usize,
    sums: Vec<f64>,
}

impl Pool {
    pub(crate) fn new(pooling: Pooling, prompt: &[u32]) -> Pool {
        let next = match pooling {
            Pooling::Mean => usize::from(prompt.len() > 1 && prompt[0] == EOS),
            Pooling::Last => prompt.len() - 1,
        };
        Pool { next, end: prompt.len(), sums: Vec::new() }
    }

    /// The next token whose hidden state is wanted; none when all are there.
    pub(crate) fn next(&self) -> Option<usize> {
        (self.next < self.end).then_some(self.next)
    }

    /// Adds hidden states of the next tokens, `[N, W]`, each of `width` numbers.
    pub(crate) fn add(&mut self, hidden: &[f32], width: usize) {
        self.sums.resize(width, 0.0);
        for hidden in hidden.chunks(width) {
            self.sums.iter_mut().zip(hidden).for_each(|(sum, x)| *sum += *x as f64);
            self.next += 1;
        }
    }

    /// The vector, of length 1; once all are there. A mean has the direction of the sum.
    pub(crate) fn vector(&self) -> Option<Vec<f32>> {
        let length = self.sums.iter().map(|x| x * x).sum::<f64>().sqrt();
        // Of nothing but zeros there is no direction.
        let scale = if length > 0.0 { length.recip() } else { 0.0 };
        let complete = self.next().is_none();
        complete.then(|| self.sums.iter().map(|x| (x * scale) as f32).collect())
    }
}
