//! The pages about the configuration say what the program does.

use ferropt_train::config::Config;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The names that a refusal offers: "…; there are: a, b, c".
fn offered(toml: &str) -> Vec<String> {
    let refusal = Config::parse(toml, &[]).unwrap_err().to_string();
    let (_, names) =
        refusal.split_once("there are: ").unwrap_or_else(|| panic!("no list of names: {refusal}"));
    names.split(", ").map(String::from).collect()
}

/// The text between the backquotes of a cell, if there are any.
fn quoted(cell: &str) -> Option<&str> {
    cell.trim().strip_prefix('`')?.strip_suffix('`')
}

#[test]
fn the_page_names_every_key_of_the_configuration_and_no_other() {
    let page = read("docs/configuration.md");
    let mut rows = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
        assert_eq!(cells.len(), 4, "{line}");
        let key = quoted(cells[0]).unwrap().to_string();
        assert!(rows.insert(key, cells[2]).is_none(), "twice: {line}");
    }
    let mut keys = Vec::new();
    for section in offered("[zzzzzz]") {
        assert!(page.contains(&format!("`[{section}]`")), "no heading for [{section}]");
        keys.extend(
            offered(&format!("[{section}]\nzzzzzz = 1")).iter().map(|key| format!("{section}.{key}")),
        );
    }
    keys.sort();
    assert_eq!(rows.keys().cloned().collect::<Vec<_>>(), keys);

    // A default in backquotes is TOML, and the one that the program has.
    let defaults: toml::Table = toml::from_str(&Config::default().to_toml().unwrap()).unwrap();
    for (key, cell) in &rows {
        let (section, name) = key.split_once('.').unwrap();
        let Some(text) = quoted(cell) else { continue };
        let written: toml::Table = toml::from_str(&format!("default = {text}")).unwrap();
        assert_eq!(Some(&written["default"]), defaults[section].get(name), "{key}");
    }
    for (section, values) in &defaults {
        for (name, value) in values.as_table().unwrap() {
            let key = format!("{section}.{name}");
            let required = ["data.train", "run.dir"].contains(&&*key);
            assert!(required || quoted(rows[&key]).is_some(), "{key} has the default {value}");
        }
    }
}

#[test]
fn examples_are_valid_configurations() {
    let mut found = 0;
    for file in std::fs::read_dir(root().join("configs")).unwrap() {
        let name = file.unwrap().path();
        let config = Config::parse(&read(&name), &[]).unwrap_or_else(|e| panic!("{}: {e:#}", name.display()));
        config.resolve().unwrap_or_else(|e| panic!("{}: {e:#}", name.display()));
        found += 1;
    }
    assert!(found >= 4, "{found} files in configs/");
    let smallest = format!("```toml\n{}```", read("configs/smallest.toml"));
    assert!(read("README.md").contains(&smallest), "README.md shows configs/smallest.toml as it is");
}
