//! `ferropt serve`: models over HTTP.

use crate::model::{OpeningArgs, draft_tokens};
use crate::notify::{READY, STOPPING, notify};
use anyhow::{Context, Result, bail, ensure};
use ferropt_engine::DRAFT_TOKENS;
use ferropt_serve::{Keys, Limits, Log, ModelSource, Options, Server, Tls, new_key};
use ferropt_train::inference::{Model, Opening};
use ferropt_train::models;
use ferropt_train::signals::Stop;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

/// Arguments of `ferropt serve`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, args_override_self = true, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// A model as for `ferropt generate`, and what requests call it, which is the last part of its path unless given; may
    /// be repeated. Requests that name no model get the first
    #[arg(long = "model", value_name = "[NAME=]PATH", required = true)]
    models: Vec<String>,
    #[command(flatten)]
    opening: OpeningArgs,
    /// A smaller model with the same tokenizer that guesses ahead, and for which model, which may be left out where there is
    /// one only; may be repeated. Texts stay the same and come faster while few are computed together
    #[arg(long = "draft", value_name = "[NAME=]PATH")]
    drafts: Vec<String>,
    /// Tokens that a draft guesses at most
    #[arg(long, value_name = "N", default_value_t = DRAFT_TOKENS, requires = "drafts", value_parser = draft_tokens())]
    draft_tokens: usize,
    /// Another name of a model; may be repeated
    #[arg(long = "alias", value_name = "ALIAS=NAME")]
    aliases: Vec<String>,
    /// Address to listen on; 0.0.0.0 for all of the machine's
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Only for those with a key in this file, see `ferropt serve key`
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// Encrypt connections: PEM file of the certificate, with those that lead to its authority behind it. Read again when it
    /// changes
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// PEM file of the certificate's private key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Let web pages of this origin use the API, such as `https://example.org`; may be repeated
    #[arg(long, value_name = "ORIGIN")]
    cors: Vec<String>,
    /// A name of this machine by which its own clients may call the server without keys, such as that of a proxy on it that passes
    /// on `Host`; may be repeated. `localhost` and addresses always may, and others not: a web page could make its name mean
    /// this machine
    #[arg(long = "allow-host", value_name = "NAME")]
    allowed_hosts: Vec<String>,
    /// Give out `/metrics` without a key, for a Prometheus that has none. They have no texts, but names of models and figures
    /// of use
    #[arg(long)]
    open_metrics: bool,
    /// Let prompts of one key go on from where those of another were like them. Then nothing is read twice, but how soon an answer
    /// begins tells a key's holder whether others sent a prompt that begins so
    #[arg(long, requires = "api_keys")]
    share_prefixes: bool,
    /// Texts of a model that are computed together. Results do not depend on it
    #[arg(long, value_name = "N", default_value_t = 64)]
    sequences: usize,
    /// Tokens of all these texts that the cache has room for; a quarter of what they could have unless given. When it is
    /// full, the youngest texts wait
    #[arg(long, value_name = "N")]
    cache_tokens: Option<usize>,
    /// Take the memory for them from the system before the first request, not when texts first need it: then no request waits
    /// for it, and a machine that has too little shows it at once
    #[arg(long)]
    reserve_cache: bool,
    /// Milliseconds that texts being generated may wait while new prompts are read, which is done in pieces for it, of 64 tokens
    /// at least, and of 8 for each text. Larger pieces are faster for the prompts
    #[arg(long, value_name = "MS", default_value_t = 250)]
    pause_ms: u64,
    /// Prompts that may wait for a model; more are refused
    #[arg(long, value_name = "N", default_value_t = Limits::default().queue)]
    queue: usize,
    /// Seconds that a request may wait for its turn
    #[arg(long, value_name = "S", default_value_t = Limits::default().queue_time.as_secs())]
    queue_seconds: u64,
    /// Seconds that a request may take, waiting included
    #[arg(long, value_name = "S", default_value_t = Limits::default().request_time.as_secs())]
    timeout_seconds: u64,
    /// Seconds that a client may take for the handshake of TLS, to send a request, or to take in what is sent to it
    #[arg(long, value_name = "S", default_value_t = Limits::default().client_time.as_secs())]
    client_seconds: u64,
    /// Texts of a request: prompts times `n`, `best_of` or `beams`
    #[arg(long, value_name = "N", default_value_t = Limits::default().texts)]
    max_texts: usize,
    /// Bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().body)]
    max_body: usize,
    /// Bytes of memory for the bodies of all requests while they are received and read; one that finds none is refused
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().body_memory)]
    body_memory: usize,
    /// Bytes of memory for answers that clients have not taken in; when there are more, the connection is closed of whoever took
    /// nothing in for longest
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().answer_memory)]
    answer_memory: usize,
    /// Connections at one time; more are refused, except for /health, /ready and /metrics
    #[arg(long, value_name = "N", default_value_t = Limits::default().connections)]
    connections: usize,
    /// Connections of one address at one time, or of one network (/64) of IPv6, so that nobody takes them all; more are refused.
    /// Behind a proxy, which is the one address then, as many as --connections
    #[arg(long, value_name = "N", default_value_t = Limits::default().client_connections)]
    client_connections: usize,
    /// At Ctrl-C, SIGTERM or SIGHUP: seconds in which requests that were taken are completed
    #[arg(long, value_name = "S", default_value_t = 30)]
    drain_seconds: u64,
    /// No log. By default each request is a line of JSON on standard error, without its prompt and text
    #[arg(long)]
    no_log: bool,
    /// Write prompts and texts into the log
    #[arg(long, conflicts_with = "no_log")]
    log_texts: bool,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make an API key: prints the line for the file of keys, and on standard error the key itself.
    Key {
        /// Whose key it is, for the log
        name: String,
    },
}

const EXAMPLES: &str = "\
Examples:
  ferropt serve --model runs/a
  ferropt serve --model small=runs/a --model large=opt-1.3b --alias gpt-3.5-turbo-instruct=large --weights int8
  ferropt serve --model large=opt-6.7b --draft large=opt-125m
  ferropt serve key alice >> keys
  ferropt serve --model runs/a --host 0.0.0.0 --api-keys keys --tls-cert fullchain.pem --tls-key privkey.pem

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{\"prompt\": \"Once upon\"}'

Every limit is documented with its default in docs/serving.md; /openapi.json describes all routes and fields.";

/// A step has a row for each text at least, and memory for all rows.
const MOST_SEQUENCES: usize = 4096;

/// Bytes that an answer of as many likely tokens as may be has.
const LARGEST_ANSWER: usize = 256 << 20;

pub(crate) fn run(args: Args) -> Result<()> {
    if let Some(Command::Key { name }) = &args.command {
        let (key, line) = new_key(name)?;
        crate::until_reader_leaves(writeln!(std::io::stdout(), "{line}").map_err(Into::into))?;
        writeln!(std::io::stderr(), "the key, which is kept nowhere: {key}")?;
        return Ok(());
    }
    let keys = match &args.api_keys {
        Some(file) => Keys::read(file)?,
        None => Keys::default(),
    };
    if args.api_keys.is_none() && !args.host.is_loopback() {
        tell!("warning: everybody who reaches {} can use the models; --api-keys asks for a key", args.host);
    }
    let stop = Stop::default();
    stop.on_signals()?;
    let server = Server::start(args.options(keys)?)?;
    let scheme = if args.tls_cert.is_some() { "https" } else { "http" };
    say!("listening on {scheme}://{}; Ctrl-C stops", server.address());
    let mut told = false;
    while !stop.requested() {
        if let Some(failure) = server.failure() {
            server.stop(Duration::ZERO);
            bail!("no model can be used\n{failure}");
        }
        if !told && server.is_ready() {
            told = true;
            notify(READY);
        }
        sleep(Duration::from_millis(50));
    }
    notify(STOPPING);
    match server.stop(Duration::from_secs(args.drain_seconds)) {
        0 => Ok(()),
        left => bail!("{left} requests were not complete after {} s and were ended", args.drain_seconds),
    }
}

/// Refuses what no browser sends as an origin, since nothing would ever match it.
fn check_origin(origin: &str) -> Result<()> {
    let is_host = |host: &str| {
        let rest = host.trim_start_matches("[").replace("]", "");
        !rest.is_empty() && rest.chars().all(|c| c.is_ascii_alphanumeric() || "-._:".contains(c))
    };
    let written = origin.split_once("://").filter(|(scheme, host)| {
        !scheme.is_empty() && is_host(host) && origin.to_ascii_lowercase() == origin
    });
    ensure!(
        origin == "*" || written.is_some(),
        "--cors {origin}: expected an origin as browsers write it, in lower case, with a scheme and without a path or a slash at \
         the end, such as https://example.org or http://localhost:3000; or * for all"
    );
    Ok(())
}

impl Args {
    fn options(&self, keys: Keys) -> Result<Options> {
        ensure!(
            (1..=MOST_SEQUENCES).contains(&self.sequences),
            "--sequences: {} texts at a time are not from 1 to {MOST_SEQUENCES}",
            self.sequences
        );
        for (name, seconds) in [
            ("queue", self.queue_seconds),
            ("timeout", self.timeout_seconds),
            ("client", self.client_seconds),
        ] {
            ensure!(seconds > 0, "--{name}-seconds: in 0 s nothing could be done; use 1 or more");
        }
        for (name, connections) in [("", self.connections), ("client-", self.client_connections)] {
            ensure!(connections > 0, "--{name}connections: with 0 nobody could connect; use 1 or more");
        }
        ensure!(
            self.body_memory >= self.max_body,
            "--body-memory: in {} bytes there is no room for a body of --max-body {}; raise the one or lower the other",
            self.body_memory,
            self.max_body
        );
        ensure!(
            self.answer_memory >= LARGEST_ANSWER,
            "--answer-memory: in {} bytes there is no room for the largest answers; use {LARGEST_ANSWER} or more",
            self.answer_memory
        );
        self.cors.iter().try_for_each(|origin| check_origin(origin))?;
        let pair = |alias: &String| {
            let pair = alias.split_once('=').map(|(alias, name)| (alias.to_string(), name.to_string()));
            pair.with_context(|| {
                format!("--alias {alias}: expected another name and a model's, such as gpt=small")
            })
        };
        let tls = match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => Some(Tls::read(certificate, key)?),
            _ => None,
        };
        let models = self.models.iter().map(|model| named(model)).collect::<Result<Vec<_>>>()?;
        let drafts = drafts_of(&models, &self.drafts)?;
        let sources =
            models.into_iter().zip(drafts).map(|((name, path), draft)| self.source(name, path, draft));
        Ok(Options {
            address: SocketAddr::new(self.host, self.port),
            models: sources.collect::<Result<_>>()?,
            aliases: self.aliases.iter().map(pair).collect::<Result<_>>()?,
            keys,
            tls,
            cors: self.cors.clone(),
            allowed_hosts: self.allowed_hosts.clone(),
            open_metrics: self.open_metrics,
            share_prefixes: self.share_prefixes,
            limits: Limits {
                queue: self.queue,
                queue_time: Duration::from_secs(self.queue_seconds),
                request_time: Duration::from_secs(self.timeout_seconds),
                client_time: Duration::from_secs(self.client_seconds),
                texts: self.max_texts,
                body: self.max_body,
                body_memory: self.body_memory,
                answer_memory: self.answer_memory,
                connections: self.connections,
                client_connections: self.client_connections,
                ..Limits::default()
            },
            log: if self.no_log { Log::off() } else { Log::new(std::io::stderr(), self.log_texts)? },
        })
    }

    fn source(&self, name: String, path: PathBuf, draft: Option<PathBuf>) -> Result<ModelSource> {
        let (sequences, cache_tokens) = (self.sequences, self.cache_tokens);
        let (draft_tokens, pause) = (self.draft_tokens, Some(Duration::from_millis(self.pause_ms)));
        let reserve = self.reserve_cache;
        let opening =
            Opening { draft, draft_tokens, pause, reserve, ..self.opening.opening(sequences, None)? };
        let open = move || {
            let cache_tokens = Some(cached(&path, &opening, cache_tokens)?);
            Model::open(&path, &Opening { cache_tokens, ..opening })
        };
        Ok(ModelSource { name, open: Box::new(open) })
    }
}

/// Name and path of a model. A path that exists is one, whatever is in it.
fn split(text: &str) -> (Option<&str>, &Path) {
    match text.split_once('=') {
        Some((name, path)) if !Path::new(text).exists() => (Some(name), Path::new(path)),
        _ => (None, Path::new(text)),
    }
}

fn named(model: &str) -> Result<(String, PathBuf)> {
    let (name, path) = split(model);
    let name = match name {
        Some(name) => Some(name.to_string()),
        None => path.file_name().map(|name| name.to_string_lossy().into_owned()),
    };
    Ok((name.with_context(|| format!("--model {model}: give it a name, NAME={model}"))?, path.into()))
}

/// The draft of each model.
fn drafts_of(models: &[(String, PathBuf)], drafts: &[String]) -> Result<Vec<Option<PathBuf>>> {
    let mut all = vec![None; models.len()];
    let names = || models.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
    for draft in drafts {
        let (name, path) = split(draft);
        let place = match name {
            Some(name) => models.iter().position(|(own, _)| own == name).with_context(|| {
                format!("--draft {draft}: there is no model {name:?}; there is {}", names())
            })?,
            None => {
                ensure!(
                    models.len() == 1,
                    "--draft {draft}: there is {}; say whose draft it is, NAME={draft}",
                    names()
                );
                0
            }
        };
        let before = all[place].replace(path.into());
        ensure!(before.is_none(), "--draft {draft}: the model {:?} has a draft already", models[place].0);
    }
    Ok(all)
}

/// Tokens that the cache has room for: one of the longest texts always fits.
fn cached(path: &Path, opening: &Opening, wanted: Option<usize>) -> Result<usize> {
    let named = models::open(path, opening.checkpoint, opening.preset.as_deref(), models::Whole::Sizes)?;
    let positions = named.source.config().positions;
    Ok(wanted.unwrap_or(opening.sequences * positions / 4).max(positions))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_as_browsers_write_them() {
        for right in
            ["*", "https://example.org", "http://localhost:3000", "http://[::1]:80", "chrome-extension://abc"]
        {
            check_origin(right).unwrap();
        }
        for wrong in [
            "",
            "example.org",
            "https://example.org/",
            "https://",
            "https://Example.org",
            "https://a b",
            "null",
        ] {
            let error = check_origin(wrong).unwrap_err().to_string();
            assert!(
                error.contains(&format!("--cors {wrong}:")) && error.contains("https://example.org"),
                "{error}"
            );
        }
    }

    #[test]
    fn drafts_find_their_models() {
        let model = |text: &str| named(text).unwrap();
        assert_eq!(model("runs/a"), ("a".into(), "runs/a".into()));
        let models = [model("small=runs/a"), model("large=runs/b=c")];
        let found = |models: &[(String, PathBuf)], drafts: &[&str]| {
            let drafts: Vec<String> = drafts.iter().map(|draft| draft.to_string()).collect();
            drafts_of(models, &drafts).map_err(|error| error.to_string())
        };
        assert_eq!(found(&models, &["large=runs/d"]).unwrap(), [None, Some("runs/d".into())]);
        assert_eq!(found(&models[..1], &["runs/d"]).unwrap(), [Some("runs/d".into())]);
        for (drafts, part) in [
            (&["runs/d"][..], "say whose draft it is, NAME=runs/d"),
            (&["big=runs/d"], "no model \"big\"; there is small, large"),
            (&["large=a", "large=b"], "has a draft already"),
        ] {
            let error = found(&models, drafts).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
