//! What stands for a mirror in a build without object stores: nothing, as [`check`](super::check) lets none be configured.

use super::super::attempt::Hurry;
use super::super::load::Checkpoint;
use super::super::store::{Found, Store};
use super::super::team::{Share, Team};
use super::super::writer::Event;
use super::{Copies, Copy, check};
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

/// A mirror; there is none in this build.
#[derive(Debug)]
pub enum Mirror {}

impl Mirror {
    /// # Errors
    /// Always: this build has no object stores.
    pub fn open(url: &str) -> Result<Mirror> {
        check(url)?;
        bail!("this build has no object stores, so it cannot reach {url}")
    }

    /// # Errors
    /// Always: this build has no object stores.
    pub fn create(url: &str) -> Result<Mirror> {
        Mirror::open(url)
    }

    /// Nothing is there.
    ///
    /// # Errors
    /// None.
    pub fn list(&self) -> Result<Vec<Copy>> {
        match *self {}
    }

    /// Nothing is wrong.
    ///
    /// # Errors
    /// None.
    pub fn verify(&self, _: &Copy, _: &mut dyn FnMut(u64, u64)) -> Result<Vec<String>> {
        match *self {}
    }

    /// Nothing is fetched.
    ///
    /// # Errors
    /// None.
    pub fn fetch_copy(&self, _: &Copy, _: &Store, _: &mut dyn FnMut(u64, u64)) -> Result<Checkpoint> {
        match *self {}
    }

    /// Nothing is newer.
    ///
    /// # Errors
    /// None.
    pub fn fetch_newer(
        &self,
        _: &Store,
        _: Share,
        _: Option<(u64, u64)>,
        _: impl FnMut(&[u8]) -> Result<Vec<Vec<u8>>>,
    ) -> Result<Option<Found>> {
        match *self {}
    }
}

#[derive(Debug)]
pub(in super::super) enum Uploads {}

impl Uploads {
    pub(in super::super) fn start(
        copies: &Copies,
        _: &Path,
        _: Team,
        _: Hurry,
        _: impl Fn(Event) + Send + 'static,
    ) -> Result<Uploads> {
        match Mirror::create(&copies.url)? {}
    }

    pub(in super::super) fn submit(&self, _: u64, _: PathBuf) {
        match *self {}
    }

    pub(in super::super) fn finish(self) {
        match self {}
    }
}
