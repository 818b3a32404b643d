//! The parameter table: what decides allocation, initial values, checkpoints and the planner.

use crate::config::{Config, POSITION_OFFSET};

/// Standard deviation of OPT's initial weights.
pub(crate) const INITIAL_STD: f64 = 0.006;

/// An LM head that is a matrix of its own.
pub(crate) const HEAD: &str = "lm_head.weight";

/// Initial values of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Initial {
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// All zero.
    Zeros,
    /// All one.
    Ones,
}

/// How a parameter is divided among the parts of a tensor-parallel model (Shoeybi et al., 2019, "Megatron-LM").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Each part has some of the rows: what comes out of its products is divided.
    Rows,
    /// Each part has some of the columns: what goes into its products is divided.
    Columns,
    /// Each part has all of it.
    Whole,
}

/// One parameter, as it lies in memory. Matrices are of the compute type, vectors always f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Names in Hugging Face checkpoints. More than one where the rows of that many equally large tensors are stacked
    /// (q, k and v).
    pub names: Vec<String>,
    /// `[out, in]` for matrices, `[out]` for vectors.
    pub shape: Vec<usize>,
    /// Values before the first step.
    pub initial: Initial,
    /// How tensor-parallel parts divide it; where tensors are stacked, each of them.
    pub split: Split,
}

impl Parameter {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it is a matrix.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() == 2
    }

    /// Whether products read it, so that inference may store it in fewer bits: all matrices but the positions.
    pub fn is_weight(&self) -> bool {
        self.is_matrix() && !self.names[0].ends_with("embed_positions.weight")
    }

    /// Number of the layer that it belongs to, if it is of one.
    pub fn layer(&self) -> Option<usize> {
        self.names[0].split_once(".layers.")?.1.split('.').next()?.parse().ok()
    }

    /// Shape of each of the tensors that are stacked.
    pub fn part_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        shape[0] /= self.names.len();
        shape
    }
}

impl Config {
    /// All parameters. Their numbers in this list name their streams of random numbers.
    pub fn parameters(&self) -> Vec<Parameter> {
        let (c, f, w) = (self.width, self.feed_forward, self.embedding_width);
        let normal = Initial::Normal(INITIAL_STD);
        // What adds to the residual stream starts smaller, as in Megatron-LM, so that the sum does not grow with depth.
        let into_residual = Initial::Normal(INITIAL_STD / ((2 * self.layers) as f64).sqrt());
        let mut table = Table(Vec::new());
        table.add("embed_tokens.weight", &[self.vocab, w], normal, Split::Rows);
        table.add("embed_positions.weight", &[self.positions + POSITION_OFFSET, c], normal, Split::Whole);
        if self.has_projections() {
            table.add("project_in.weight", &[c, w], normal, Split::Whole);
        }
        for l in 0..self.layers {
            table.stacked(l, ["q", "k", "v"].map(|x| format!("self_attn.{x}_proj")), [3 * c, c], normal);
            table.linear(l, "self_attn.out_proj", [c, c], into_residual, Split::Columns);
            table.norm(&format!("layers.{l}.self_attn_layer_norm"), c);
            table.linear(l, "fc1", [f, c], normal, Split::Rows);
            table.linear(l, "fc2", [c, f], into_residual, Split::Columns);
            table.norm(&format!("layers.{l}.final_layer_norm"), c);
        }
        if !self.post_norm {
            table.norm("final_layer_norm", c);
        }
        if self.has_projections() {
            table.add("project_out.weight", &[w, c], normal, Split::Whole);
        }
        if self.own_head {
            let (names, shape) = (vec![HEAD.into()], vec![self.vocab, w]);
            table.0.push(Parameter { names, shape, initial: normal, split: Split::Rows });
        }
        table.0
    }
}

struct Table(Vec<Parameter>);

impl Table {
    fn add(&mut self, name: &str, shape: &[usize], initial: Initial, split: Split) {
        self.0.push(Parameter { names: vec![full(name)], shape: shape.to_vec(), initial, split });
    }

    fn linear(&mut self, layer: usize, name: &str, [out, into]: [usize; 2], initial: Initial, split: Split) {
        self.add(&format!("layers.{layer}.{name}.weight"), &[out, into], initial, split);
        // A bias is added to what comes out, once.
        let split = if split == Split::Columns { Split::Whole } else { split };
        self.add(&format!("layers.{layer}.{name}.bias"), &[out], Initial::Zeros, split);
    }

    fn stacked(&mut self, layer: usize, names: [String; 3], [out, into]: [usize; 2], initial: Initial) {
        for (end, shape, initial) in
            [("weight", vec![out, into], initial), ("bias", vec![out], Initial::Zeros)]
        {
            let names = names.iter().map(|name| full(&format!("layers.{layer}.{name}.{end}"))).collect();
            self.0.push(Parameter { names, shape, initial, split: Split::Rows });
        }
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.add(&format!("{name}.weight"), &[width], Initial::Ones, Split::Whole);
        self.add(&format!("{name}.bias"), &[width], Initial::Zeros, Split::Whole);
    }
}

fn full(name: &str) -> String {
    format!("model.decoder.{name}")
}
