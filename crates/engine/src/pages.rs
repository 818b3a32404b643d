//! Who uses which page of the KV cache, and which pages hold the beginning of a text that may come again.
//!
//! A full page is known by its tokens and by the content before it, so that the pages of a text form a chain, and a new
//! text finds how much of itself is there already, if that is of its own scope: chains of different scopes begin apart. Pages
//! that nobody uses keep what they hold until they are needed: first those that hold nothing, then those that were given back
//! longest ago.

use ferropt_device::PAGE;
use std::collections::{BTreeSet, HashMap};

/// Whose texts may find each other's beginnings: those of one scope, and of no other. How long a prompt takes to be read tells
/// whether somebody in its scope had one that begins alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Scope(pub [u8; 32]);

/// Names what is before a page of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Nothing: it is the first of a text of this scope.
    Beginning(Scope),
    /// A page, and all before it.
    Page(u64),
}

/// A page's tokens and what is before them. The tokens themselves, not a hash: two texts can never be taken for one.
type Key = (Content, [u32; PAGE]);

/// The pages of a cache.
pub struct Pages {
    users: Vec<u32>,
    held: Vec<Option<Key>>,
    /// Pages without users, with when they were given back; 0 for those that hold nothing.
    free: BTreeSet<(u64, u32)>,
    given_back: Vec<u64>,
    known: HashMap<Key, (Content, u32)>,
    /// Pages that were held and moments so far.
    clock: u64,
}

impl Pages {
    /// `count` pages that hold nothing.
    pub fn new(count: usize) -> Pages {
        Pages {
            users: vec![0; count],
            held: vec![None; count],
            free: (0..count as u32).map(|page| (0, page)).collect(),
            given_back: vec![0; count],
            known: HashMap::new(),
            clock: 0,
        }
    }

    /// Number of pages.
    pub fn total(&self) -> usize {
        self.users.len()
    }

    /// Pages without users.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// Users of a page.
    pub fn users(&self, page: u32) -> u32 {
        self.users[page as usize]
    }

    /// A page for new content, with one user; what it held is forgotten.
    pub fn take(&mut self) -> Option<u32> {
        let (_, page) = self.free.pop_first()?;
        if let Some(key) = self.held[page as usize].take() {
            self.known.remove(&key);
        }
        self.users[page as usize] = 1;
        Some(page)
    }

    /// One more user of a page.
    pub fn share(&mut self, page: u32) {
        let i = page as usize;
        if self.users[i] == 0 {
            self.free.remove(&(self.given_back[i], page));
        }
        self.users[i] += 1;
    }

    /// One user less.
    pub fn give_back(&mut self, page: u32) {
        let i = page as usize;
        assert!(self.users[i] > 0, "page {page} is given back twice");
        self.users[i] -= 1;
        if self.users[i] == 0 {
            self.given_back[i] = if self.held[i].is_some() { self.tick() } else { 0 };
            self.free.insert((self.given_back[i], page));
        }
    }

    /// The page that holds `tokens` behind `before`, if there is one. It may have no users.
    pub fn find(&self, before: Content, tokens: &[u32; PAGE]) -> Option<(Content, u32)> {
        self.known.get(&(before, *tokens)).copied()
    }

    /// Notes that a used page is full of `tokens`. If another page holds the same, that one stays the known one.
    pub fn hold(&mut self, page: u32, before: Content, tokens: &[u32; PAGE]) -> Content {
        let key = (before, *tokens);
        if let Some((content, _)) = self.known.get(&key) {
            return *content;
        }
        let content = Content::Page(self.tick());
        self.known.insert(key, (content, page));
        self.held[page as usize] = Some(key);
        content
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Content = Content::Beginning(Scope([0; 32]));

    fn page_of(token: u32) -> [u32; PAGE] {
        [token; PAGE]
    }

    #[test]
    fn pages_are_taken_once_and_come_back() {
        let mut pages = Pages::new(3);
        let all: BTreeSet<u32> = (0..3).map(|_| pages.take().unwrap()).collect();
        assert_eq!((all.len(), pages.available(), pages.take()), (3, 0, None));
        pages.share(1);
        pages.give_back(1);
        assert_eq!(pages.take(), None, "it has a user left");
        pages.give_back(1);
        assert_eq!(pages.take(), Some(1));
    }

    #[test]
    fn chains_are_found_until_their_pages_are_needed() {
        let mut pages = Pages::new(4);
        let [a, b, c] = [(); 3].map(|()| pages.take().unwrap());
        let first = pages.hold(a, NOTHING, &page_of(7));
        let second = pages.hold(b, first, &page_of(7));
        assert_eq!(pages.find(NOTHING, &page_of(7)), Some((first, a)));
        assert_eq!(pages.find(first, &page_of(7)), Some((second, b)));
        assert_eq!(pages.find(second, &page_of(7)), None, "the same tokens elsewhere are other content");
        assert_eq!(pages.hold(c, first, &page_of(7)), second, "a double is known by the first page");
        for page in [c, b, a] {
            pages.give_back(page);
        }
        // The page that was never used and the double go first, then the end of the chain.
        let order = [(); 4].map(|()| pages.take().unwrap());
        assert_eq!(order[2..], [b, a]);
        assert_eq!(pages.find(NOTHING, &page_of(7)), None);
    }

    #[test]
    fn a_text_is_found_in_its_own_scope_only() {
        let mut pages = Pages::new(2);
        let [a, b] = [(); 2].map(|()| pages.take().unwrap());
        let other = Content::Beginning(Scope([1; 32]));
        let first = pages.hold(a, NOTHING, &page_of(7));
        assert_eq!(pages.find(other, &page_of(7)), None);
        assert_ne!(pages.hold(b, other, &page_of(7)), first, "no double of the other scope's");
        assert_eq!(pages.find(NOTHING, &page_of(7)), Some((first, a)));
    }

    #[test]
    fn what_is_used_again_is_not_taken() {
        let mut pages = Pages::new(2);
        let a = pages.take().unwrap();
        let content = pages.hold(a, NOTHING, &page_of(1));
        pages.give_back(a);
        assert_eq!(pages.available(), 2);
        let (found, page) = pages.find(NOTHING, &page_of(1)).unwrap();
        pages.share(page);
        assert_eq!((found, pages.available()), (content, 1));
        assert_ne!(pages.take(), Some(a));
        assert_eq!(pages.take(), None);
        pages.give_back(a);
        assert_eq!(pages.take(), Some(a));
        assert_eq!(pages.find(NOTHING, &page_of(1)), None, "forgotten when it is taken");
    }
}
