//! Reading fields of JSON by their path. Invariant: a complaint names the whole path and shows the value, and an
//! absent field and `null` are the same.

use std::net::IpAddr;
use std::str::FromStr;

use serde_json::Value;

use crate::error::{Error, code};

/// A value and how to get there from the document's root.
#[derive(Debug, Clone)]
pub(crate) struct At<'a> {
    path: String,
    pub(crate) value: &'a Value,
}

impl<'a> At<'a> {
    pub(crate) fn root(value: &'a Value) -> Self {
        At { path: String::new(), value }
    }

    /// The field of that name, unless absent; the value must be an object.
    pub(crate) fn get(&self, key: &str) -> Result<Option<At<'a>>, Error> {
        if !self.value.is_object() {
            return Err(self.wrong("an object"));
        }
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        Ok(self.value.get(key).filter(|value| !value.is_null()).map(|value| At { path, value }))
    }

    /// [`At::get`], read by `read`.
    pub(crate) fn field<T>(
        &self,
        key: &str,
        read: impl FnOnce(&At<'a>) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        self.get(key)?.map(|at| read(&at)).transpose()
    }

    /// [`At::list`] of a field, empty where it is absent.
    pub(crate) fn items<T>(
        &self,
        key: &str,
        read: impl Fn(&At<'a>) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        Ok(self.field(key, |at| at.list(read))?.unwrap_or_default())
    }

    /// Every item, read by `read`; the value must be an array.
    pub(crate) fn list<T>(&self, read: impl Fn(&At<'a>) -> Result<T, Error>) -> Result<Vec<T>, Error> {
        let items = self.value.as_array().ok_or_else(|| self.wrong("an array"))?;
        let at = |(n, value)| At { path: format!("{}[{n}]", self.path), value };
        items.iter().enumerate().map(|item| read(&at(item))).collect()
    }

    pub(crate) fn text(&self) -> Result<String, Error> {
        self.value.as_str().map(str::to_owned).ok_or_else(|| self.wrong("a string"))
    }

    /// Booleans may be strings: some callers write them so.
    pub(crate) fn flag(&self) -> Result<bool, Error> {
        match self.value {
            Value::Bool(flag) => Ok(*flag),
            Value::String(text) if text == "true" => Ok(true),
            Value::String(text) if text == "false" => Ok(false),
            _ => Err(self.wrong("true or false")),
        }
    }

    pub(crate) fn number(&self, min: u64, max: u64) -> Result<u64, Error> {
        let number = self.value.as_u64().filter(|number| (min..=max).contains(number));
        number.ok_or_else(|| self.wrong(&format!("a number from {min} to {max}")))
    }

    pub(crate) fn small(&self, min: u32, max: u32) -> Result<u32, Error> {
        let number = self.number(u64::from(min), u64::from(max))?;
        u32::try_from(number).map_err(|_| self.wrong("a smaller number"))
    }

    pub(crate) fn parse<T: FromStr>(&self, what: &str) -> Result<T, Error> {
        self.text()?.parse().map_err(|_| self.wrong(what))
    }

    pub(crate) fn ip(&self) -> Result<IpAddr, Error> {
        self.parse("an IP address")
    }

    /// Code 7: the value is not what the field takes.
    pub(crate) fn wrong(&self, expected: &str) -> Error {
        self.error(code::BAD_CONFIG, &format!("must be {expected}"))
    }

    /// Code 2: the value is fine, and nothing here does it.
    pub(crate) fn unsupported(&self, why: &str) -> Error {
        self.error(code::UNSUPPORTED_FIELD, &format!("is not supported: {why}"))
    }

    fn error(&self, code: u32, what: &str) -> Error {
        /// Of the value, in a message.
        const SHOWN_CHARS: usize = 120;
        let path = if self.path.is_empty() { "the configuration" } else { &self.path };
        let mut shown: String = self.value.to_string();
        if shown.chars().count() > SHOWN_CHARS {
            shown = shown.chars().take(SHOWN_CHARS).chain("…".chars()).collect();
        }
        Error::new(code, format!("{path} {shown} {what}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn complaints_name_path_and_value() {
        let document = json!({"a": {"b": [{"c": 7}, {"c": "x"}]}, "n": null});
        let root = At::root(&document);
        let a = root.get("a").unwrap().unwrap();
        let read = |at: &At<'_>| at.field("c", |c| c.number(1, 9));
        let error = a.items("b", read).unwrap_err();
        assert_eq!(error.code, code::BAD_CONFIG);
        assert_eq!(error.message, "a.b[1].c \"x\" must be a number from 1 to 9");
        assert!(root.get("n").unwrap().is_none() && root.get("z").unwrap().is_none());
        assert!(At::root(&json!([])).get("a").unwrap_err().message.starts_with("the configuration []"));
        let error = a.unsupported("no").message;
        assert!(error.starts_with("a {") && error.contains("not supported"), "{error}");
        let long = json!("y".repeat(500));
        assert!(At::root(&long).ip().unwrap_err().message.len() < 200);
    }
}
