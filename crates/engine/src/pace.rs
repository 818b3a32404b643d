//! How many tokens of prompts a step reads beside texts that are being generated.
//!
//! A step gives every text its next token when all of it is computed, so a long piece of a prompt makes all of them wait.
//! Short pieces make those wait who have no token yet: every step reads all weights and computes a token of all the others first.

use std::time::Duration;

/// Tokens that are read in any case: fewer would hardly be faster, since products are limited by reading weights then.
const LEAST: usize = 64;
/// As many for each text, or for each prompt that waits if these are more, however long that takes: where texts are so many that they
/// fill the pause themselves, or soon will be, those without a token yet have most of each step. A step of which so much is prompts
/// says what a token of them takes.
const MOSTLY: usize = 8;
/// Weight of the newest measurement.
const NEWEST: f64 = 0.3;

/// Learns from the steps that were made.
#[derive(Debug)]
pub(crate) struct Pace {
    pause: Option<Duration>,
    /// Of a token of a prompt; 0 before that was measured.
    seconds: f64,
}

impl Pace {
    /// Prompts shall add `pause` to a step at most, where that can be.
    pub(crate) fn new(pause: Option<Duration>) -> Pace {
        Pace { pause, seconds: 0.0 }
    }

    /// Tokens of prompts in a step beside so many texts.
    pub(crate) fn beside(&self, texts: usize) -> usize {
        let Some(pause) = self.pause else { return usize::MAX };
        let in_time = if self.seconds > 0.0 { (pause.as_secs_f64() / self.seconds) as usize } else { 0 };
        in_time.max(LEAST).max(MOSTLY * texts)
    }

    /// Notes how long a step took with so many tokens of prompts, and other rows.
    pub(crate) fn took(&mut self, prompts: usize, others: usize, time: Duration) {
        if prompts < LEAST.max(MOSTLY * others) {
            return;
        }
        let now = time.as_secs_f64() / (prompts + others) as f64;
        let newest = if self.seconds > 0.0 { NEWEST } else { 1.0 };
        self.seconds += newest * (now - self.seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine on which a step takes so many milliseconds, and as many more for each token of a prompt and each text:
    /// tokens of prompts beside so many texts, and what they add to a step.
    fn settle(pause: u64, step: f64, token: f64, texts: usize, text: f64) -> (usize, f64) {
        let mut pace = Pace::new(Some(Duration::from_millis(pause)));
        let mut make = |prompts: usize, texts: usize| {
            let time = step + token * prompts as f64 + text * texts as f64;
            pace.took(prompts, texts, Duration::from_secs_f64(time / 1e3));
            pace.beside(texts).min(512)
        };
        assert_eq!(make(0, 1), LEAST, "careful at first; texts say nothing of prompts");
        let mut prompts = make(512, 0);
        for _ in 0..50 {
            make(0, texts);
            prompts = make(prompts, texts);
        }
        (prompts, token * prompts as f64)
    }

    #[test]
    fn prompts_add_the_pause_to_steps_where_they_can() {
        let (prompts, added) = settle(100, 10.0, 0.5, 4, 1.0);
        assert!((160..=200).contains(&prompts) && (80.0..=100.0).contains(&added), "{prompts}, {added} ms");
        let (prompts, added) = settle(100, 10.0, 0.5, 16, 1.0);
        assert!(
            (160..=200).contains(&prompts),
            "what texts take is no reason to read less: {prompts}, {added} ms"
        );
        assert_eq!(
            settle(100, 10.0, 0.5, 40, 3.0).0,
            40 * MOSTLY,
            "those that wait come before those that have some"
        );
        assert_eq!(settle(100, 5.0, 0.01, 4, 1.0).0, 512, "all that a step may have");
        assert_eq!(settle(100, 900.0, 30.0, 4, 100.0).0, LEAST, "a large model goes on all the same");
        assert_eq!(Pace::new(None).beside(1), usize::MAX);
    }
}
