//! The text in one field of a JSON object. Of everything else only names are kept, for messages: an object may hold much more than
//! its text, and as values that takes many times the memory of the line.

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Unexpected, Visitor};
use std::fmt;

/// Most names that a message lists, and most characters of each.
const NAMES: usize = 20;
const NAME: usize = 60;

/// Reads the text in the field of this name. Errors name the fields that there are.
pub(super) struct OneField<'a>(pub &'a str);

impl<'de> DeserializeSeed<'de> for OneField<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for OneField<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a JSON object with a text field `{}`", self.0)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<String, E> {
        // Not the string itself, which may be long.
        Err(E::invalid_type(Unexpected::Other("a string"), &self))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<String, A::Error> {
        let (mut text, mut names, mut more) = (None, Vec::new(), 0);
        while let Some(name) = map.next_key::<String>()? {
            if name == self.0 {
                // The last of several counts, as everywhere.
                text = Some(map.next_value_seed(Text(self.0))?);
                continue;
            }
            map.next_value::<IgnoredAny>()?;
            if names.len() < NAMES {
                names.push(name.chars().take(NAME).collect::<String>());
            } else {
                more += 1;
            }
        }
        text.ok_or_else(|| {
            Error::custom(format!(
                "there is no field `{}`; the fields are: {}{}; name the one that holds the text (data.text_field in a \
                 configuration, --text-field of a command)",
                self.0,
                names.join(", "),
                if more > 0 { format!(" and {more} more") } else { String::new() }
            ))
        })
    }
}

/// Reads what the field of this name holds.
struct Text<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_string(self)
    }
}

impl Visitor<'_> for Text<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a string in the field `{}`", self.0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        Ok(text.into())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<String, E> {
        Ok(text)
    }
}
