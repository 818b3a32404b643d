//! What a request may ask for, and the refusal of what makes no sense.

use crate::embed::Pooling;
use crate::pages::Scope;
use std::fmt;

/// Most choices that a request may compute.
pub const MOST_CHOICES: usize = 128;
/// Most stop strings of a request.
pub const MOST_STOPS: usize = 64;
/// Most likeliest tokens beside each chosen one.
pub const MOST_LOG_PROBS: usize = 100;

/// How a text is continued.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// Tokens to generate at most; as many as the model has positions for when absent. 0 computes the prompt only.
    pub max_tokens: Option<usize>,
    /// So many tokens come before `</s>` may, and before stop strings are looked for.
    pub min_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token (the lowest id of those that are equal).
    pub temperature: f32,
    /// Only among that many of the likeliest.
    pub top_k: Option<usize>,
    /// Of those, only the fewest that together have this probability (Holtzman et al., 2020).
    pub top_p: f32,
    /// `top_p` becomes smaller as a sentence becomes longer.
    pub decay: Option<Decay>,
    /// Of those, only the ones at least this share as likely as the likeliest (Nguyen et al., 2024).
    pub min_p: f32,
    /// Logits of tokens that the prompt or the text has are divided by it where positive, else multiplied (Keskar et al.,
    /// 2019). 1 does nothing.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens that were generated.
    pub presence_penalty: f32,
    /// Taken off the logits of tokens as often as they were generated.
    pub frequency_penalty: f32,
    /// Taken off the logits of tokens that the prompt has.
    pub prompt_presence_penalty: f32,
    /// Taken off the logits of tokens as often as the prompt has them.
    pub prompt_frequency_penalty: f32,
    /// The two look at so many of the prompt's first tokens; at all when absent.
    pub penalised_prompt: Option<usize>,
    /// These four penalties are taken off when the temperature has divided the logits already, as metaseq does, instead of
    /// before.
    pub penalties_after_temperature: bool,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the choices. A choice depends on it, on the number of the choice and on the place in the text.
    pub seed: u64,
    /// The text ends before the first of these strings.
    pub stop: Vec<String>,
    /// `</s>` is never chosen.
    pub ignore_end: bool,
    /// Texts to give back.
    pub n: usize,
    /// Texts to compute, of which the `n` with the highest mean log-probability of a token are given back.
    pub best_of: Option<usize>,
    /// Beam search over so many texts at a time. The best `n` by the sum of log-probabilities over length^length_penalty
    /// are given back.
    pub beams: Option<usize>,
    /// See `beams`; above 0 it favours longer texts.
    pub length_penalty: f32,
    /// Also give back the tokens of the prompt, from this one on.
    pub echo: Option<usize>,
    /// Give log-probabilities, and so many of the likeliest tokens with each. They are those of the model, before
    /// temperature, penalties and bias.
    pub log_probs: Option<usize>,
    /// With log-probabilities, also give the `</s>` that ends a text, as a token without text; not of searches.
    pub tell_end: bool,
    /// Give the prompt's hidden states as one vector of length 1, and nothing else; see [`Parameters::embedding`].
    pub pooling: Option<Pooling>,
    /// Where its prompt may be found in the cache, so that it is not computed again. No text depends on it.
    pub scope: Scope,
}

impl Default for Parameters {
    /// One text, sampled from the model's own distribution.
    fn default() -> Self {
        Parameters {
            max_tokens: None,
            min_tokens: 0,
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            decay: None,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            prompt_presence_penalty: 0.0,
            prompt_frequency_penalty: 0.0,
            penalised_prompt: None,
            penalties_after_temperature: false,
            logit_bias: Vec::new(),
            seed: 1,
            stop: Vec::new(),
            ignore_end: false,
            n: 1,
            best_of: None,
            beams: None,
            length_penalty: 1.0,
            echo: None,
            log_probs: None,
            tell_end: false,
            pooling: None,
            scope: Scope::default(),
        }
    }
}

/// Factual nucleus sampling (Lee et al., "Factuality Enhanced Language Models for Open-Ended Text Generation", 2022), as
/// metaseq has it: the longer a sentence is, the less may be left to chance.
///
/// Behind s tokens of a sentence, `top_p` is max(`least`, `top_p` · `rate`^max(0, s - 1)). A sentence begins with the text,
/// and behind each token that ends one.
#[derive(Clone, Debug, PartialEq)]
pub struct Decay {
    /// Above 0, up to 1.
    pub rate: f32,
    /// From 0 to 1.
    pub least: f32,
    /// Tokens that end a sentence.
    pub ends: Vec<u32>,
}

/// A text to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Its tokens; OPT's texts begin with `</s>`.
    pub prompt: Vec<u32>,
    /// How to continue it.
    pub parameters: Parameters,
}

/// Why a request is not taken: the parameter's name, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// As in [`Parameters`] or [`Request`].
    pub parameter: &'static str,
    /// With the value and the limit.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}

/// What an engine can do for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Ids in the vocabulary.
    pub vocab: usize,
    /// Positions of the model.
    pub positions: usize,
    /// Pages of the cache.
    pub pages: usize,
    /// Sequences that are computed together.
    pub sequences: usize,
    /// Tokens of all of them that a step computes at most.
    pub step_tokens: usize,
    /// Numbers of a prompt's vector.
    pub width: usize,
}

macro_rules! refuse_unless {
    ($ok:expr, $parameter:literal, $($message:tt)*) => {
        if !$ok {
            return Err(Refusal { parameter: $parameter, message: format!($($message)*) });
        }
    };
}

impl Parameters {
    /// No text, but the prompt as a vector.
    pub fn embedding(pooling: Pooling) -> Parameters {
        Parameters { max_tokens: Some(0), pooling: Some(pooling), ..Parameters::default() }
    }

    /// Refuses values that are out of range or contradict each other, whatever the model.
    ///
    /// # Errors
    /// Names the parameter, its value and the limit.
    pub fn check(&self) -> Result<(), Refusal> {
        let finite_above_0 = |x: f32| x > 0.0 && x.is_finite();
        if let Some(max) = self.max_tokens {
            refuse_unless!(
                self.min_tokens <= max,
                "min_tokens",
                "min_tokens = {} is more than max_tokens = {max}",
                self.min_tokens
            );
        }
        refuse_unless!(
            self.temperature >= 0.0 && self.temperature.is_finite(),
            "temperature",
            "temperature = {} is not a number from 0 (always the likeliest token) up",
            self.temperature
        );
        refuse_unless!(
            self.top_k != Some(0),
            "top_k",
            "top_k = 0 leaves no token to choose from; use 1 or more"
        );
        refuse_unless!(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "top_p",
            "top_p = {} is not a probability above 0, up to 1",
            self.top_p
        );
        refuse_unless!(
            (0.0..=1.0).contains(&self.min_p),
            "min_p",
            "min_p = {} is not a share from 0 to 1",
            self.min_p
        );
        refuse_unless!(
            finite_above_0(self.repetition_penalty),
            "repetition_penalty",
            "repetition_penalty = {} is not a number above 0; 1 does nothing",
            self.repetition_penalty
        );
        for (parameter, penalty) in self.penalties() {
            if !(-2.0..=2.0).contains(&penalty) {
                let message = format!("{parameter} = {penalty} is not between -2 and 2");
                return Err(Refusal { parameter, message });
            }
        }
        if let Some(Decay { rate, least, .. }) = self.decay {
            refuse_unless!(
                rate > 0.0 && rate <= 1.0 && (0.0..=1.0).contains(&least),
                "decay",
                "decay at a rate of {rate} down to {least}: the rate must be above 0 and up to 1, the least from 0 to 1"
            );
        }
        for (id, bias) in &self.logit_bias {
            refuse_unless!(
                (-100.0..=100.0).contains(bias),
                "logit_bias",
                "logit_bias of token {id} is {bias}, which is not between -100 and 100"
            );
        }
        refuse_unless!(
            self.stop.len() <= MOST_STOPS,
            "stop",
            "{} stop strings are more than {MOST_STOPS}",
            self.stop.len()
        );
        refuse_unless!(
            self.stop.iter().all(|s| !s.is_empty()),
            "stop",
            "a stop string is empty, so that every text would end at once; leave it out"
        );
        if let Some(top) = self.log_probs {
            refuse_unless!(
                top <= MOST_LOG_PROBS,
                "log_probs",
                "log_probs = {top} is more than {MOST_LOG_PROBS} tokens at each place"
            );
        }
        self.check_choices()
    }

    /// What is taken off logits, by name.
    fn penalties(&self) -> [(&'static str, f32); 4] {
        [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
            ("prompt_presence_penalty", self.prompt_presence_penalty),
            ("prompt_frequency_penalty", self.prompt_frequency_penalty),
        ]
    }

    /// The part about several texts.
    fn check_choices(&self) -> Result<(), Refusal> {
        refuse_unless!(
            (1..=MOST_CHOICES).contains(&self.n),
            "n",
            "n = {} is not between 1 and {MOST_CHOICES}",
            self.n
        );
        if let Some(best_of) = self.best_of {
            refuse_unless!(
                (self.n..=MOST_CHOICES).contains(&best_of),
                "best_of",
                "best_of = {best_of} is not between n = {} and {MOST_CHOICES}",
                self.n
            );
            refuse_unless!(
                best_of == self.n || self.temperature > 0.0,
                "best_of",
                "best_of = {best_of} with temperature = 0 would compute the same text each time; raise the temperature or \
                 use beams"
            );
        }
        if let Some(pooling) = self.pooling {
            let alone = self.max_tokens == Some(0) && self.computed() == 1 && self.beams.is_none();
            refuse_unless!(
                alone && self.echo.is_none(),
                "pooling",
                "pooling = {} makes a vector of the prompt alone; set max_tokens = 0, and neither n, beams nor echo",
                pooling.name()
            );
        }
        let Some(beams) = self.beams else { return Ok(()) };
        refuse_unless!(
            (self.n..=MOST_CHOICES).contains(&beams) && beams > 0,
            "beams",
            "beams = {beams} is not between n = {} and {MOST_CHOICES}",
            self.n
        );
        refuse_unless!(
            self.length_penalty.is_finite(),
            "length_penalty",
            "length_penalty = {} is not a number",
            self.length_penalty
        );
        let plain = Parameters::default();
        for (parameter, is_plain) in [
            ("temperature", self.temperature == 0.0),
            ("top_k", self.top_k == plain.top_k),
            ("top_p", self.top_p == plain.top_p),
            ("min_p", self.min_p == plain.min_p),
            ("repetition_penalty", self.repetition_penalty == plain.repetition_penalty),
            ("decay", self.decay == plain.decay),
            ("logit_bias", self.logit_bias.is_empty()),
            ("stop", self.stop.is_empty()),
            ("best_of", self.best_of.is_none()),
        ]
        .into_iter()
        .chain(self.penalties().map(|(parameter, penalty)| (parameter, penalty == 0.0)))
        {
            refuse_unless!(
                is_plain,
                "beams",
                "beams = {beams} searches for the likeliest texts, with which {parameter} does not go; {}",
                if parameter == "temperature" { "set temperature = 0" } else { "leave one of them out" }
            );
        }
        Ok(())
    }

    /// Texts that are computed.
    pub fn computed(&self) -> usize {
        self.best_of.unwrap_or(self.n)
    }
}

impl Request {
    /// Refuses what the engine cannot do.
    ///
    /// # Errors
    /// Names the parameter, its value and the limit.
    pub fn check(&self, capacity: &Capacity) -> Result<(), Refusal> {
        let (p, prompt) = (&self.parameters, self.prompt.len());
        p.check()?;
        refuse_unless!(prompt > 0, "prompt", "the prompt has no tokens; OPT's texts begin with </s>");
        let Capacity { vocab, positions, pages, sequences, .. } = *capacity;
        refuse_unless!(
            prompt <= positions,
            "prompt",
            "the prompt has {prompt} tokens, counting the </s> in front, but the model has {positions} positions; shorten it"
        );
        for (parameter, id) in self
            .prompt
            .iter()
            .map(|id| ("prompt", id))
            .chain(p.logit_bias.iter().map(|b| ("logit_bias", &b.0)))
        {
            if *id as usize >= vocab {
                let message =
                    format!("{parameter} has the token id {id}, but the vocabulary has {vocab} ids");
                return Err(Refusal { parameter, message });
            }
        }
        if let Some(echo) = p.echo {
            refuse_unless!(
                echo < prompt,
                "echo",
                "echo from token {echo} on was asked for, but the prompt has only {prompt} tokens"
            );
        }
        let beams = p.beams.unwrap_or(1);
        refuse_unless!(
            beams <= sequences,
            "beams",
            "beams = {beams} is more than the {sequences} sequences that are computed together"
        );
        let longest = prompt.saturating_add(p.max_tokens.unwrap_or(positions)).min(positions);
        let each = longest.div_ceil(ferropt_device::PAGE);
        // Beams are there all at once, and each may need a page while it waits for the others.
        let needed = if beams > 1 { beams * (each + 1) } else { each };
        refuse_unless!(
            needed <= pages,
            "max_tokens",
            "{beams} texts of up to {longest} tokens need {needed} pages of the cache, which has {pages}; lower max_tokens or \
             make the cache larger"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests;
