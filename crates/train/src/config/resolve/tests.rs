use super::*;

const EXPLICIT: &str = "\
[model]
layers = 2
heads = 2
width = 32
vocab = 260
positions = 64
[data]
train = 'texts'
tokenizer = 'tokenizer.json'
validation.held-out = 'valid.txt'
[batch]
tokens = 512
[run]
dir = 'runs/a'
steps = 100
";

const PRESET: &str = "\
[model]
preset = '125m'
[data]
train = ['a.txt', 'b.jsonl']
tokenizer = 'tokenizer'
[run]
dir = 'runs/a'
tokens = '1B'
";

fn resolve(text: &str, set: &[&str]) -> anyhow::Result<Resolved> {
    let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
    Config::parse(text, &set)?.resolve()
}

#[test]
fn a_resolved_configuration_written_out_resolves_to_itself() {
    for (text, set) in [
        (EXPLICIT, &[][..]),
        (EXPLICIT, &["model.post_norm=true", "model.embedding_width=16", "run.precision=f32"]),
        (
            EXPLICIT,
            &[
                "optimizer.kind=sgd",
                "optimizer.momentum=0.9",
                "schedule.kind=wsd",
                "run.weights=bf16-stochastic",
            ],
        ),
        (EXPLICIT, &["schedule.kind=inverse-sqrt", "checkpoint.keep_every=1000", "validation.max_tokens=1M"]),
        (EXPLICIT, &["run.device=cuda", "run.offload=optimizer"]),
        (EXPLICIT, &["data.validation="]),
        (EXPLICIT, &["run.precision=f16", "loss_scale.window=200"]),
        (PRESET, &[]),
        (
            PRESET,
            &[
                "model.vocab=1000",
                "model.positions=100",
                "data.seq=64",
                "batch.micro_batch=4",
                "batch.tokens=1024",
            ],
        ),
        (PRESET, &["schedule.warmup=\"1M tokens\"", "checkpoint.every=\"50M tokens\"", "model.preset=350m"]),
    ] {
        let once = resolve(text, set).unwrap_or_else(|e| panic!("{set:?}: {e:#}"));
        let written = once.config.to_toml().unwrap();
        let twice = resolve(&written, &[]).unwrap_or_else(|e| panic!("{set:?}: {e:#}\n{written}"));
        assert_eq!(once, twice, "{set:?}\n{written}");
    }
}

#[test]
fn defaults_are_those_of_opt() {
    let r = resolve(PRESET, &[]).unwrap();
    assert_eq!((r.seq, r.batch_tokens(), r.micro_batch, r.steps), (2048, 1 << 19, 1, 1908));
    assert_eq!((r.schedule.kind, r.schedule.peak, r.schedule.min_ratio), (Kind::Linear, 6e-4, 0.1));
    // 375M tokens are fewer steps than 2000, but more than a tenth of the run.
    assert_eq!((r.schedule.warmup, r.schedule.total), (190, 1908));
    assert_eq!(r.optimizer.rule, Rule::AdamW { betas: [0.9, 0.95], eps: 1e-8 });
    assert_eq!((r.optimizer.weight_decay, r.optimizer.clip, r.optimizer.decay_vectors), (0.1, 1.0, true));
    assert_eq!((r.model.dropout, r.model.attention_dropout), (0.1, 0.1));
    assert_eq!(r.config.data.cache.as_deref(), Some(Path::new("runs/data-cache")));
    assert_eq!(resolve(PRESET, &["run.tokens=300B"]).unwrap().schedule.warmup, 716);
}

#[test]
fn sizes_are_given_or_a_presets_with_own_vocabulary_and_positions() {
    let r = resolve(EXPLICIT, &["model.dropout=0", "model.feed_forward=40"]).unwrap();
    assert_eq!((r.model.feed_forward, r.model.embedding_width, r.model.dropout), (40, 32, 0.0));
    assert_eq!((r.sequences, r.micro_batch, r.accumulation()), (8, 8, 1));
    assert_eq!(r.model_name(), "OPT of 2 layers, 2 heads, width 32");
    let r = resolve(PRESET, &["model.vocab=1000", "model.positions=64"]).unwrap();
    assert_eq!((r.model.vocab, r.model.positions, r.model.width, r.seq), (1000, 64, 768, 64));
    assert_eq!(r.model_name(), "OPT 125m");
}

#[test]
fn refusals_name_the_key_the_value_and_the_fix() {
    let cases: &[(&str, &[&str], &[&str])] = &[
        (
            EXPLICIT,
            &["run.precision=f16", "run.weights=bf16-stochastic"],
            &["run.weights = \"bf16-stochastic\"", "remove"],
        ),
        (EXPLICIT, &["loss_scale.window=9"], &["loss_scale.window = 9", "run.precision = \"bf16\"", "f16"]),
        (
            EXPLICIT,
            &["run.precision=f16", "loss_scale.initial=1000"],
            &["loss_scale.initial = 1000", "power of two"],
        ),
        (
            EXPLICIT,
            &["run.precision=f16", "loss_scale.initial=-2"],
            &["loss_scale.initial = -2", "power of two"],
        ),
        (
            EXPLICIT,
            &["run.precision=f16", "loss_scale.initial=2", "loss_scale.floor=4"],
            &["loss_scale.floor = 4", "loss_scale.initial = 2"],
        ),
        (EXPLICIT, &["run.precision=f16", "loss_scale.window=0"], &["loss_scale.window = 0", "1000"]),
        (PRESET, &["model.preset=125M"], &["model.preset = \"125M\"", "\"125m\""]),
        (PRESET, &["model.width=64"], &["model.preset = \"125m\"", "model.width = 64", "remove one"]),
        (PRESET, &["model.post_norm=false"], &["model.post_norm = false", "remove one"]),
        (EXPLICIT, &["model.width="], &["model.width is missing", "model.preset"]),
        (EXPLICIT, &["model.vocab="], &["model.vocab is missing"]),
        (EXPLICIT, &["model.layers=0"], &["model.layers = 0", "at least 1"]),
        (EXPLICIT, &["model.heads=3"], &["model.width = 32", "heads = 3", "33"]),
        (EXPLICIT, &["model.vocab=2"], &["model.vocab = 2", "4"]),
        (EXPLICIT, &["model.width=99999999999999"], &["model.", "more than"]),
        (EXPLICIT, &["model.dropout=1"], &["model.dropout = 1", "[0, 1)", "0.1"]),
        (EXPLICIT, &["model.attention_dropout=-1"], &["model.attention_dropout = -1"]),
        (EXPLICIT, &["data.train="], &["data.train is missing"]),
        (EXPLICIT, &["data.tokenizer="], &["data.tokenizer is missing"]),
        (EXPLICIT, &["data.validation.held-out=[]"], &["data.validation.held-out is empty"]),
        (EXPLICIT, &["data.validation.a/b=x"], &["\"a/b\"", "letters"]),
        (EXPLICIT, &["data.seq=0"], &["data.seq = 0"]),
        (EXPLICIT, &["data.seq=65"], &["data.seq = 65", "64 positions", "raise model.positions"]),
        (EXPLICIT, &["batch.tokens=500"], &["batch.tokens = 500", "data.seq = 64", "448", "512"]),
        (EXPLICIT, &["batch.tokens=0"], &["batch.tokens = 0", "64"]),
        (EXPLICIT, &["batch.tokens=32"], &["batch.tokens = 32", "less than one sequence", "the least is 64"]),
        (EXPLICIT, &["model.dropout=0.99999999"], &["model.dropout = 0.99999999", "single precision"]),
        (EXPLICIT, &["batch.micro_batch=3"], &["batch.micro_batch = 3", "8 sequences", "use for example 8"]),
        (EXPLICIT, &["batch.micro_batch=0"], &["batch.micro_batch = 0"]),
        (EXPLICIT, &["run.tokens=1M"], &["run.steps = 100", "run.tokens = 1000000", "remove one"]),
        (EXPLICIT, &["run.steps="], &["length of the run is missing", "run.steps"]),
        (EXPLICIT, &["run.steps=0"], &["0 steps"]),
        (
            EXPLICIT,
            &["run.steps=9000000T"],
            &["9000000000000000000 steps", "batch.tokens = 512", "lower run.steps"],
        ),
        (EXPLICIT, &["run.max_minutes=0"], &["run.max_minutes = 0"]),
        (EXPLICIT, &["run.max_minutes=nan"], &["run.max_minutes = NaN"]),
        (EXPLICIT, &["run.max_minutes=inf"], &["run.max_minutes = inf"]),
        (EXPLICIT, &["run.dir="], &["run.dir is missing"]),
        (EXPLICIT, &["run.threads=0"], &["run.threads = 0"]),
        (EXPLICIT, &["run.threads=2000"], &["run.threads = 2000", "1024"]),
        (EXPLICIT, &["run.offload=all"], &["run.offload = \"all\"", "run.device = \"cpu\"", "remove"]),
        (EXPLICIT, &["run.offload=disk"], &["disk", "none", "optimizer", "all"]),
        (
            EXPLICIT,
            &["run.precision=f32", "run.weights=split"],
            &["run.precision = \"f32\"", "run.weights = \"split\""],
        ),
        (EXPLICIT, &["optimizer.lr=0"], &["optimizer.lr = 0"]),
        (EXPLICIT, &["recovery.window=8"], &["recovery.window = 8", "128"]),
        (EXPLICIT, &["recovery.loss_threshold=1"], &["recovery.loss_threshold = 1", "ordinary steps"]),
        (EXPLICIT, &["recovery.norm_threshold=nan"], &["recovery.norm_threshold = NaN"]),
        (EXPLICIT, &["recovery.lr_factor=1.5"], &["recovery.lr_factor = 1.5", "at most 1"]),
        (EXPLICIT, &["recovery.clip_factor=0"], &["recovery.clip_factor = 0"]),
        (EXPLICIT, &["recovery.cooldown=0"], &["recovery.cooldown", "remove it"]),
        (EXPLICIT, &["optimizer.lr=inf"], &["optimizer.lr = inf"]),
        (EXPLICIT, &["optimizer.lr=1e-60"], &["optimizer.lr = 0.0000", "single precision"]),
        (EXPLICIT, &["optimizer.lr=1e300"], &["optimizer.lr = 1000", "single precision"]),
        (EXPLICIT, &["optimizer.betas=[0.9,0.99999999]"], &["0.99999999", "single precision"]),
        (EXPLICIT, &["optimizer.kind=sgd", "optimizer.momentum=0.99999999"], &["momentum = 0.99999999"]),
        (EXPLICIT, &["optimizer.eps=inf"], &["optimizer.eps = inf", "1e-8"]),
        (EXPLICIT, &["optimizer.eps=1e-60"], &["optimizer.eps = 0.0000", "1e-8"]),
        (EXPLICIT, &["optimizer.weight_decay=1e300"], &["optimizer.weight_decay = 1000", "0.1"]),
        (EXPLICIT, &["optimizer.clip=1e-300"], &["optimizer.clip = 0.0000", "no clipping"]),
        (
            EXPLICIT,
            &[
                "schedule.kind=wsd",
                "schedule.warmup=9000000000000000000",
                "schedule.decay=9223372036854775807",
            ],
            &["schedule.warmup", "longer than the whole schedule"],
        ),
        (
            EXPLICIT,
            &["schedule.kind=wsd", "schedule.warmup=18446744073709551615 steps", "schedule.decay=2"],
            &["schedule.warmup", "longer than the whole schedule"],
        ),
        (EXPLICIT, &["optimizer.momentum=0.9"], &["\"adamw\"", "optimizer.momentum = 0.9", "sgd"]),
        (
            EXPLICIT,
            &["optimizer.kind=sgd", "optimizer.betas=[0.9,0.9]"],
            &["\"sgd\"", "optimizer.betas = [0.9, 0.9]"],
        ),
        (EXPLICIT, &["optimizer.kind=sgd", "optimizer.eps=1e-6"], &["\"sgd\"", "optimizer.eps = 0.000001"]),
        (EXPLICIT, &["optimizer.kind=sgd", "optimizer.momentum=1"], &["optimizer.momentum = 1", "[0, 1)"]),
        (EXPLICIT, &["optimizer.betas=[0.9,1.0]"], &["optimizer.betas = [0.9, 1.0]", "[0, 1)"]),
        (EXPLICIT, &["optimizer.eps=0"], &["optimizer.eps = 0", "1e-8"]),
        (EXPLICIT, &["optimizer.weight_decay=-1"], &["optimizer.weight_decay = -1", "0.1"]),
        (EXPLICIT, &["optimizer.clip=nan"], &["optimizer.clip = NaN", "no clipping"]),
        (
            EXPLICIT,
            &["schedule.warmup=101"],
            &["schedule.warmup (101 steps)", "(100 steps)", "schedule.total"],
        ),
        (EXPLICIT, &["schedule.kind=wsd", "schedule.decay=95"], &["schedule.decay (95 steps)"]),
        (EXPLICIT, &["schedule.decay=5"], &["schedule.kind = \"linear\"", "schedule.decay = 5"]),
        (EXPLICIT, &["schedule.kind=constant", "schedule.total=5"], &["\"constant\"", "schedule.total = 5"]),
        (
            EXPLICIT,
            &["schedule.kind=inverse-sqrt", "schedule.min_lr=0"],
            &["\"inverse-sqrt\"", "schedule.min_lr = 0"],
        ),
        (EXPLICIT, &["schedule.min_lr=2"], &["schedule.min_lr = 2", "0 to 1"]),
        (EXPLICIT, &["checkpoint.every=0"], &["checkpoint.every is 0 steps"]),
        (EXPLICIT, &["checkpoint.keep_last=0"], &["checkpoint.keep_last = 0", "1 or more"]),
        (
            EXPLICIT,
            &["checkpoint.keep_every=750"],
            &["checkpoint.keep_every = 750", "checkpoint.every = 500", "1000"],
        ),
        (
            EXPLICIT,
            &["checkpoint.mirror=bucket/x"],
            &["checkpoint.mirror", "\"bucket/x\"", "s3://BUCKET/PATH"],
        ),
        (
            EXPLICIT,
            &["checkpoint.mirror_keep_last=2"],
            &["checkpoint.mirror_keep_last", "checkpoint.mirror is not"],
        ),
        (EXPLICIT, &["checkpoint.mirror_keep_every=750"], &["checkpoint.mirror_keep_every = 750", "1000"]),
        #[cfg(not(feature = "object-store"))]
        (EXPLICIT, &["checkpoint.mirror=s3://b/x"], &["checkpoint.mirror", "--features object-store"]),
        #[cfg(feature = "object-store")]
        (
            EXPLICIT,
            &["checkpoint.mirror=s3://b/x", "checkpoint.mirror_keep_last=0"],
            &["checkpoint.mirror_keep_last = 0", "1 or more"],
        ),
        (EXPLICIT, &["checkpoint.keep_every=0"], &["checkpoint.keep_every is 0 steps"]),
        (EXPLICIT, &["validation.every=0"], &["validation.every is 0 steps"]),
        (EXPLICIT, &["validation.max_tokens=0"], &["validation.max_tokens = 0"]),
        (
            EXPLICIT,
            &["data.validation=", "validation.every=20"],
            &["validation.every = 20 steps", "data.validation.held-out", "remove validation.every"],
        ),
        (
            PRESET,
            &["validation.max_tokens=1M"],
            &["validation.max_tokens = 1M", "data.validation.held-out", "remove validation.max_tokens"],
        ),
        (
            EXPLICIT,
            &["recovery.clip_factor=0.5", "optimizer.clip=0"],
            &["recovery.clip_factor = 0.5", "optimizer.clip = 0", "remove"],
        ),
        (
            EXPLICIT,
            &["recovery.lr_factor=1", "recovery.cooldown=1M tokens"],
            &["recovery.cooldown = 1M tokens", "recovery.lr_factor = 1", "remove"],
        ),
        (EXPLICIT, &["log.every=0"], &["log.every is 0 steps"]),
        (EXPLICIT, &["energy.watts=0"], &["energy.watts = 0", "5"]),
    ];
    for (text, set, parts) in cases {
        let message = match resolve(text, set) {
            Ok(resolved) => panic!("{set:?} is accepted: {:?}", resolved.config),
            Err(error) => format!("{error:#}"),
        };
        assert!(parts.iter().all(|p| message.contains(p)), "{set:?} should mention {parts:?}:\n{message}");
    }
}
