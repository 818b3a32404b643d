//! Unknown keys are refused with their full dotted name and the nearest valid one.
//!
//! The valid names come from the configuration types themselves: a deserializer that reads nothing but asks each
//! struct which fields it wants. So there is no second list to keep in step.

use super::*;
use serde::de::{DeserializeOwned, Deserializer, Visitor, value::Error};

/// Sections whose keys are fixed, with the names of their keys.
fn sections() -> Vec<(&'static str, &'static [&'static str])> {
    let table: Vec<(&'static str, &'static [&'static str])> = vec![
        ("model", fields_of::<ModelSection>()),
        ("data", fields_of::<DataSection>()),
        ("batch", fields_of::<BatchSection>()),
        ("optimizer", fields_of::<OptimizerSection>()),
        ("schedule", fields_of::<ScheduleSection>()),
        ("run", fields_of::<RunSection>()),
        ("parallel", fields_of::<ParallelSection>()),
        ("checkpoint", fields_of::<CheckpointSection>()),
        ("recovery", fields_of::<RecoverySection>()),
        ("loss_scale", fields_of::<LossScaleSection>()),
        ("validation", fields_of::<ValidationSection>()),
        ("log", fields_of::<LogSection>()),
        ("energy", fields_of::<EnergySection>()),
    ];
    debug_assert_eq!(fields_of::<Config>(), table.iter().map(|s| s.0).collect::<Vec<_>>());
    table
}

/// Refuses every unknown section and key of `table` at once.
pub(super) fn check(table: &toml::Table) -> anyhow::Result<()> {
    let sections = sections();
    let valid: Vec<String> =
        sections.iter().flat_map(|(s, keys)| keys.iter().map(move |k| format!("{s}.{k}"))).collect();
    let valid: Vec<&str> = valid.iter().map(String::as_str).collect();
    let mut wrong = Vec::new();
    for (section, value) in table {
        let keys = sections.iter().find(|(s, _)| s == section).map(|s| s.1);
        match (keys, value) {
            (Some(keys), toml::Value::Table(inner)) => {
                for key in inner.keys().filter(|k| !keys.contains(&k.as_str())) {
                    let name = format!("{section}.{key}");
                    wrong.push(complain(
                        &name,
                        &format!("a key of [{section}]"),
                        keys,
                        nearest(&name, &valid),
                    ));
                }
            }
            (Some(_), other) => {
                wrong.push(format!("`{section}` is a section ([{section}]), not a {}", other.type_str()))
            }
            (None, value) => {
                let names: Vec<&str> = sections.iter().map(|s| s.0).collect();
                // `lr = 1e-3` at the top level, or a misspelt section.
                let near = match value {
                    toml::Value::Table(_) => nearest(section, &names),
                    _ => nearest(section, &valid),
                };
                wrong.push(complain(section, "a section", &names, near));
            }
        }
    }
    anyhow::ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn complain(name: &str, what: &str, valid: &[&str], near: Option<&str>) -> String {
    match near {
        Some(near) => format!("unknown key `{name}`; did you mean `{near}`?"),
        None => format!("unknown key `{name}`, which is not {what}; there are: {}", valid.join(", ")),
    }
}

/// The valid name most like `name`, by its last part first, then by section; `None` when nothing is similar.
fn nearest<'a>(name: &str, valid: &[&'a str]) -> Option<&'a str> {
    let split =
        |s: &str| s.rsplit_once('.').map_or((String::new(), s.into()), |(a, b)| (a.into(), b.to_string()));
    let (section, key) = split(name);
    let key = key.to_lowercase();
    let likeness = |candidate: &str| {
        let k = split(candidate).1;
        let part = k.split('_').any(|w| w == key) || key.split('_').any(|w| w == k);
        strsim::jaro_winkler(&key, &k).max(if part { 0.85 } else { 0.0 })
    };
    let home = |candidate: &str| if split(candidate).0 == section { 0.2 } else { 0.0 };
    valid
        .iter()
        .copied()
        .filter(|v| likeness(v) > 0.82)
        .max_by(|a, b| (likeness(a) + home(a)).total_cmp(&(likeness(b) + home(b))))
}

/// Names of the fields that `T` deserialises from.
fn fields_of<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    // Fails by construction: it hands over no value, only learns the names.
    let _ = T::deserialize(FieldNames(&mut fields));
    fields
}

struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(serde::de::Error::custom("only the names of fields are wanted"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    fn complaint(text: &str) -> String {
        super::check(&toml::from_str(text).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn unknown_keys_are_named_with_the_nearest() {
        for (text, wrong, near) in [
            ("[optimizer]\nlearning_rat = 1", "optimizer.learning_rat", "optimizer"),
            ("[optimizer]\nweight_deacy = 1", "optimizer.weight_deacy", "optimizer.weight_decay"),
            ("[optimzer]\nlr = 1", "optimzer", "optimizer"),
            ("lr = 1", "lr", "optimizer.lr"),
            ("[run]\nwarmup = 3", "run.warmup", "schedule.warmup"),
            ("[checkpoint]\nevry = 3", "checkpoint.evry", "checkpoint.every"),
            ("[validation]\ntokens = 3", "validation.tokens", "validation.max_tokens"),
        ] {
            let message = complaint(text);
            assert!(message.contains(&format!("`{wrong}`")) && message.contains(near), "{text}: {message}");
        }
    }

    #[test]
    fn all_unknown_keys_are_reported_and_hopeless_ones_list_the_choices() {
        let message = complaint("[run]\nqqqq = 1\n[log]\nevvery = 1");
        assert!(message.contains("`run.qqqq`") && message.contains("max_minutes"), "{message}");
        assert!(message.contains("`log.every`"), "{message}");
        assert!(complaint("model = 3").contains("[model]"));
    }

    #[test]
    fn names_of_validation_sets_are_free() {
        assert!(super::check(&toml::from_str("[data.validation]\nanything = 'x.txt'").unwrap()).is_ok());
    }
}
