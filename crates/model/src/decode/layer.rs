//! One layer over new tokens of many sequences.

use super::{Activations, Numbers};
use crate::config::Config;
use crate::weights::Norm;
use ferropt_device::{Activation, Device, Element, Placed};

/// Weights of a layer.
pub(super) struct Layer<D: Device> {
    pub(super) qkv: Linear<D>,
    pub(super) out: Linear<D>,
    pub(super) norm1: Norm<D>,
    pub(super) fc1: Linear<D>,
    pub(super) fc2: Linear<D>,
    pub(super) norm2: Norm<D>,
}

/// A product and its bias.
pub(super) struct Linear<D: Device> {
    pub(super) weight: D::Packed,
    pub(super) bias: D::Buf<f32>,
}

/// A layer's products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Product {
    Qkv,
    Out,
    Fc1,
    Fc2,
}

impl<D: Device> Layer<D> {
    /// `stream` to `stream`, and with post-norm `normed` too. `see` is shown what goes into each product.
    pub(super) fn forward<E: Element>(
        &self,
        d: &D,
        config: &Config,
        m: usize,
        places: Placed<'_, D>,
        (k, v): &mut (D::Buf<E>, D::Buf<E>),
        rows: &mut Numbers<D>,
        a: &mut Activations<D, E>,
        see: &mut dyn FnMut(Product, &D::Buf<E>),
    ) {
        let (c, none) = (config.width, Activation::Identity);
        let (mean, rstd) = (&mut rows.mean, &mut rows.rstd);
        let Layer { qkv, out, norm1, fc1, fc2, norm2 } = self;
        if !config.post_norm {
            d.layer_norm(m, c, &a.stream, &norm1.gain, &norm1.bias, &mut a.normed, None, mean, rstd);
        }
        see(Product::Qkv, &a.normed);
        d.packed_linear(m, &a.normed, &qkv.weight, Some(&qkv.bias), none, &mut a.qkv);
        d.attention_paged(config.heads, config.head_width(), places, &a.qkv, k, v, &mut a.attended);
        see(Product::Out, &a.attended);
        d.packed_linear_residual(m, &a.attended, &out.weight, Some(&out.bias), &a.stream, &mut a.mid);
        if config.post_norm {
            d.layer_norm(
                m,
                c,
                &a.mid,
                &norm1.gain,
                &norm1.bias,
                &mut a.normed,
                Some(&mut a.stream),
                mean,
                rstd,
            );
        } else {
            d.layer_norm(m, c, &a.mid, &norm2.gain, &norm2.bias, &mut a.normed, None, mean, rstd);
        }
        see(Product::Fc1, &a.normed);
        d.packed_linear(m, &a.normed, &fc1.weight, Some(&fc1.bias), Activation::Relu, &mut a.relu);
        see(Product::Fc2, &a.relu);
        if config.post_norm {
            d.packed_linear_residual(m, &a.relu, &fc2.weight, Some(&fc2.bias), &a.stream, &mut a.mid);
            d.layer_norm(
                m,
                c,
                &a.mid,
                &norm2.gain,
                &norm2.bias,
                &mut a.normed,
                Some(&mut a.stream),
                mean,
                rstd,
            );
        } else {
            d.packed_linear_residual(m, &a.relu, &fc2.weight, Some(&fc2.bias), &a.mid, &mut a.stream);
        }
    }
}
