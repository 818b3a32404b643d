//! Arguments that name a model and how to sample from it, shared by the commands that use one.

use anyhow::{Context, Error, Result, ensure};
use clap::builder::RangedU64ValueParser;
use ferropt_data::{Marks, Tokenizer};
use ferropt_device::{WeightFormat, Which};
use ferropt_engine::{DRAFT_TOKENS, Parameters, Refusal};
use ferropt_train::checkpoint::human_bytes;
use ferropt_train::inference::{Model, Opening};
use ferropt_train::weight_cache::{Outcome, WeightCache};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Which model, and how it is computed.
#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    /// A run of `ferropt train` or one of its checkpoints, a Hugging Face or quantised folder, metaseq's files, or
    /// the name of a model that Hugging Face's tools have downloaded, such as facebook/opt-125m
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    #[command(flatten)]
    opening: OpeningArgs,
}

/// How a model is computed.
#[derive(clap::Args)]
pub(crate) struct OpeningArgs {
    /// Of a run: step of the checkpoint; the newest whole one unless given
    #[arg(long, value_name = "STEP")]
    checkpoint: Option<u64>,
    /// Of metaseq files that do not say how many heads there are: the model that they are
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Tokenizer: a folder, a tokenizer.json, or the name of a downloaded model; what lies beside the weights unless given
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// How weights are stored in memory: f32, f16, bf16, int8, int4 or int3; unless given as the run computed with them, or as on the disk, but f16 as bf16
    #[arg(long, value_name = "FORMAT", value_parser = weights)]
    weights: Option<WeightFormat>,
    /// What computes: cpu, cuda or cuda:N (the N-th GPU)
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: Which,
    /// Threads; all available unless given. Results do not depend on it
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Neither use weights that are kept on the disk, ready to be used, nor keep them (see `ferropt checkpoint cache`)
    #[arg(long)]
    no_cache: bool,
}

/// A model that guesses ahead.
#[derive(clap::Args)]
pub(crate) struct DraftArgs {
    /// A smaller model with the same tokenizer that guesses ahead: texts stay the same and come faster
    #[arg(long, value_name = "PATH")]
    draft: Option<PathBuf>,
    /// Tokens that the draft guesses at most. As many as are worth it, fewer where many are wrong or many texts are computed
    #[arg(
        long,
        value_name = "N",
        default_value_t = DRAFT_TOKENS,
        requires = "draft",
        value_parser = draft_tokens()
    )]
    draft_tokens: usize,
}

/// How many tokens a draft may guess.
pub(crate) fn draft_tokens() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=64)
}

impl ModelArgs {
    /// Opens the model for so many texts at a time, of so many tokens at most, and tells of damaged checkpoints.
    pub(crate) fn open(&self, sequences: usize, longest: Option<usize>) -> Result<Model> {
        self.open_as(self.opening.opening(sequences, longest)?)
    }

    /// The same with a draft, if there is one.
    pub(crate) fn open_with(
        &self,
        draft: &DraftArgs,
        sequences: usize,
        longest: Option<usize>,
    ) -> Result<Model> {
        let (draft, draft_tokens) = (draft.draft.clone(), draft.draft_tokens);
        self.open_as(Opening { draft, draft_tokens, ..self.opening.opening(sequences, longest)? })
    }

    fn open_as(&self, opening: Opening) -> Result<Model> {
        let model = Model::open(&self.model, &opening)?;
        for note in model.notes() {
            tell!("{note}");
        }
        match &model.kept {
            Some(Outcome::Failed(error)) => tell!("warning: {error:#}"),
            Some(Outcome::Kept(bytes)) if *bytes >= WORTH_A_WORD => tell!(
                "note: {} of weights that are ready were kept for the next time; `ferropt checkpoint cache` shows them",
                human_bytes(*bytes)
            ),
            _ => {}
        }
        Ok(model)
    }
}

impl OpeningArgs {
    /// As the library takes them, for so many texts at a time, of so many tokens at most.
    ///
    /// # Errors
    /// When the variables that say where weights are kept make no sense.
    pub(crate) fn opening(&self, sequences: usize, longest: Option<usize>) -> Result<Opening> {
        Ok(Opening {
            checkpoint: self.checkpoint,
            preset: self.preset.clone(),
            tokenizer: self.tokenizer.clone(),
            weights: self.weights,
            device: self.device,
            threads: self.threads,
            sequences,
            longest,
            cache: weight_cache(self.no_cache)?,
            ..Opening::default()
        })
    }
}

/// Bytes on the disk that a user should hear of.
const WORTH_A_WORD: u64 = 1 << 30;

/// Where weights are kept that are ready, unless the user does not want that.
pub(crate) fn weight_cache(off: bool) -> Result<Option<WeightCache>> {
    if off { Ok(None) } else { WeightCache::from_environment() }
}

/// How texts become tokens.
#[derive(clap::Args)]
pub(crate) struct MarksArgs {
    /// Put no `</s>` in front of a text. OPT was trained to begin behind one; some models made from it are not
    #[arg(long)]
    no_end_in_front: bool,
    /// Read `</s>`, `<pad>` and the tokens that the tokenizer's files add as these tokens where a text has them, not as
    /// characters
    #[arg(long)]
    special_tokens: bool,
    /// Whether the user was told about added tokens.
    #[arg(skip)]
    told: AtomicBool,
}

impl MarksArgs {
    /// As the library takes them.
    pub(crate) fn marks(&self) -> Marks {
        Marks { in_front: !self.no_end_in_front, in_text: self.special_tokens }
    }

    /// Tokens of a text. When it has added tokens that are not read as such, that is told.
    pub(crate) fn tokens(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        self.tell(tokenizer, text);
        tokenizer.encode_as(text, self.marks())
    }

    /// Tells once, when a text has added tokens that are not read as such.
    pub(crate) fn tell(&self, tokenizer: &Tokenizer, text: &str) {
        if !self.special_tokens
            && let Some(name) = tokenizer.added_in(text)
            && !self.told.swap(true, Relaxed)
        {
            tell!(
                "note: {name:?} in the text is read as characters; with --special-tokens it is the token of this name"
            );
        }
    }
}

/// How tokens are chosen.
#[derive(clap::Args)]
pub(crate) struct SamplingArgs {
    /// Always take the likeliest token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "seed"])]
    greedy: bool,
    /// Divides the logits; below 1 is more careful, above 1 wilder [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Choose among the K likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Of those, only the likeliest that together have probability P [default: 0.95]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Of those, only the ones at least P times as likely as the likeliest
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    min_p: f32,
    /// Divides positive logits of tokens that the text has already, multiplies negative ones; 1 does nothing
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    repetition_penalty: f32,
    /// Taken off the logits of tokens that were generated already (-2 to 2)
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    presence_penalty: f32,
    /// Taken off the logits of tokens for each time that they were generated (-2 to 2)
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    frequency_penalty: f32,
    /// Add to a token's logit (-100 to 100); may be repeated
    #[arg(long, value_name = "ID=X", value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Seed of the choices; the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl SamplingArgs {
    /// As the engine takes them; `beams` are never sampled.
    pub(crate) fn parameters(&self, beams: Option<usize>) -> Parameters {
        let certain = self.greedy || beams.is_some();
        Parameters {
            temperature: self.temperature.unwrap_or(if certain { 0.0 } else { 1.0 }),
            top_k: self.top_k,
            top_p: self.top_p.unwrap_or(if certain { 1.0 } else { 0.95 }),
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
            beams,
            ..Parameters::default()
        }
    }
}

/// More tokens than a text has: each stands for a byte at least, and `</s>` comes before.
pub(crate) fn tokens_at_most(text: &str) -> usize {
    text.len() + 1
}

/// A refusal, under the name of the argument.
pub(crate) fn refused(refusal: Refusal) -> Error {
    match refusal.parameter {
        "prompt" => Error::new(refusal),
        parameter => anyhow::anyhow!("--{}: {refusal}", parameter.replace('_', "-")),
    }
}

/// What a user gave as text that `\n`, `\t` and `\\` stand in.
pub(crate) fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, chars.clone().next()) {
            ('\\', Some('n')) => out.push('\n'),
            ('\\', Some('t')) => out.push('\t'),
            ('\\', Some('\\')) => out.push('\\'),
            _ => {
                out.push(c);
                continue;
            }
        }
        chars.next();
    }
    out
}

/// What lines that are not blank say, with their numbers: as `plain` takes them, or of a .jsonl file as `object` takes the
/// object on each.
pub(crate) fn each_line<T>(
    text: &str,
    jsonl: bool,
    plain: impl Fn(&str) -> T,
    object: impl Fn(serde_json::Value) -> Result<T>,
) -> Result<Vec<(usize, T)>> {
    let parse = |line: &str| match jsonl {
        false => Ok(plain(line)),
        true => object(serde_json::from_str(line).context("it is not JSON")?),
    };
    // Some editors put a byte order mark before all text.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(number, line)| Ok((number, parse(line).with_context(|| format!("line {number}"))?))).collect()
}

/// Whether a file's name says that its lines are JSON. `text_field`, if it was given, is about such lines alone.
pub(crate) fn is_jsonl(file: &Path, text_field: Option<&str>) -> Result<bool> {
    let jsonl = file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"));
    if let Some(field) = text_field {
        ensure!(
            jsonl,
            "--text-field {field} names a field of JSON lines, but the lines of {} are texts: leave it out, or name a file \
             that ends in .jsonl",
            file.display()
        );
    }
    Ok(jsonl)
}

pub(crate) fn weights(text: &str) -> Result<WeightFormat, String> {
    let found = WeightFormat::ALL.into_iter().find(|format| format.name() == text);
    found.ok_or_else(|| format!("expected one of {}", WeightFormat::ALL.map(WeightFormat::name).join(", ")))
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let parse = || {
        let (id, bias) = text.split_once('=')?;
        Some((id.trim().parse().ok()?, bias.trim().parse().ok()?))
    };
    parse().ok_or_else(|| "expected a token's id and a number, such as 50=-2.5".into())
}

#[cfg(test)]
mod tests {
    use super::unescaped;

    #[test]
    fn escapes_stand_for_what_shells_make_hard_to_type() {
        assert_eq!(unescaped(r"\n\nUser:\t\\n \x \"), "\n\nUser:\t\\n \\x \\");
    }
}
