//! Label and field selectors: parsed once, then matched against an [`ObjectIndex`] or a plain object without
//! allocating.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::index::{ObjectIndex, fields_of};
use super::kinds::Kind;
use super::{names, object};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Op {
    In,
    NotIn,
    Exists,
    NotExists,
    Greater(i64),
    Less(i64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: Box<str>,
    op: Op,
    /// Sorted.
    values: Box<[Box<str>]>,
}

impl Requirement {
    fn new(key: &str, op: Op, values: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self, String> {
        names::qualified_name(key).map_err(|why| format!("label key {key:?}: {why}"))?;
        let mut list: Vec<Box<str>> = Vec::new();
        for value in values {
            let value = value.as_ref();
            names::label_value(value).map_err(|why| format!("value {value:?} of label {key:?}: {why}"))?;
            list.push(value.into());
        }
        list.sort_unstable();
        list.dedup();
        Ok(Self { key: key.into(), op, values: list.into_boxed_slice() })
    }

    fn matches(&self, value: Option<&str>) -> bool {
        let listed = |v: &str| self.values.binary_search_by(|x| (**x).cmp(v)).is_ok();
        match &self.op {
            Op::In => value.is_some_and(listed),
            Op::NotIn => !value.is_some_and(listed),
            Op::Exists => value.is_some(),
            Op::NotExists => value.is_none(),
            Op::Greater(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *n),
            Op::Less(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *n),
        }
    }
}

/// A label selector; all requirements must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
    nothing: bool,
}

impl LabelSelector {
    /// Matches every object.
    pub fn everything() -> Self {
        Self::default()
    }

    /// Matches no object, as an absent selector of a workload does.
    pub fn nothing() -> Self {
        Self { requirements: Vec::new(), nothing: true }
    }

    /// Parses the string form of `?labelSelector=`: `a=b,c!=d,e in (f,g),h notin (i),j,!k`. Errors are 400s.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        parse_labels(text)
            .map(|requirements| Self { requirements, nothing: false })
            .map_err(|why| ApiError::bad_request(format!("unable to parse label selector {text:?}: {why}")))
    }

    /// Reads a `metav1.LabelSelector` (`matchLabels`, `matchExpressions`). `Value::Null` selects nothing, `{}`
    /// everything. The error is the broken rule, without a field path.
    pub fn from_json(selector: &Value) -> Result<Self, String> {
        let map = match selector {
            Value::Null => return Ok(Self::nothing()),
            Value::Object(map) => map,
            _ => return Err("must be an object with matchLabels or matchExpressions".to_owned()),
        };
        let mut requirements = Vec::new();
        if let Some(Value::Object(labels)) = map.get("matchLabels") {
            requirements.extend(Self::from_map(labels)?.requirements);
        }
        for item in object::items_at(selector, &["matchExpressions"]) {
            let key = object::str_at(item, &["key"]);
            let values = object::items_at(item, &["values"]);
            let strings = values
                .iter()
                .map(|v| v.as_str().ok_or_else(|| format!("values of {key:?} must be strings")))
                .collect::<Result<Vec<_>, _>>()?;
            let op = match object::str_at(item, &["operator"]) {
                "In" => Op::In,
                "NotIn" => Op::NotIn,
                "Exists" => Op::Exists,
                "DoesNotExist" => Op::NotExists,
                other => {
                    return Err(format!(
                        "operator {other:?} of {key:?} must be In, NotIn, Exists or DoesNotExist"
                    ));
                }
            };
            match op {
                Op::In | Op::NotIn if strings.is_empty() => {
                    return Err(format!("values of {key:?} must not be empty with operators In and NotIn"));
                }
                Op::Exists | Op::NotExists if !strings.is_empty() => {
                    return Err(format!(
                        "values of {key:?} must be empty with operators Exists and DoesNotExist"
                    ));
                }
                _ => requirements.push(Requirement::new(key, op, strings)?),
            }
        }
        Ok(Self { requirements, nothing: false })
    }

    /// A selector that wants each of these labels, as `Service.spec.selector` does.
    pub fn from_map(labels: &Map<String, Value>) -> Result<Self, String> {
        let requirements = labels
            .iter()
            .map(|(k, v)| {
                let v = v.as_str().ok_or_else(|| format!("the value of {k:?} must be a string"))?;
                Requirement::new(k, Op::In, [v])
            })
            .collect::<Result<Vec<_>, String>>()?;
        Ok(Self { requirements, nothing: false })
    }

    /// Whether every object matches.
    pub fn is_everything(&self) -> bool {
        !self.nothing && self.requirements.is_empty()
    }

    /// Whether the labels that `get` looks up satisfy the selector.
    pub fn matches_with<'a>(&self, get: impl Fn(&str) -> Option<&'a str>) -> bool {
        !self.nothing && self.requirements.iter().all(|r| r.matches(get(&r.key)))
    }

    /// Whether an indexed object satisfies the selector.
    pub fn matches(&self, index: &ObjectIndex) -> bool {
        self.matches_with(|key| index.label(key))
    }

    /// Whether a label map (`metadata.labels`, or absent) satisfies the selector.
    pub fn matches_labels(&self, labels: Option<&Map<String, Value>>) -> bool {
        self.matches_with(|key| labels.and_then(|m| m.get(key)).and_then(Value::as_str))
    }
}

fn parse_labels(text: &str) -> Result<Vec<Requirement>, String> {
    let mut out = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (requirement, after) = parse_requirement(rest)?;
        out.push(requirement);
        rest = after.trim_start();
        if let Some(more) = rest.strip_prefix(',') {
            rest = more.trim_start();
            if rest.is_empty() {
                return Err("a requirement must follow ','".to_owned());
            }
        } else if !rest.is_empty() {
            return Err(format!("expected ',' before {rest:?}"));
        }
    }
    Ok(out)
}

fn word(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| c.is_whitespace() || "=!(),<>".contains(c)).unwrap_or(text.len());
    text.split_at(end)
}

fn parse_requirement(text: &str) -> Result<(Requirement, &str), String> {
    if let Some(after) = text.strip_prefix('!') {
        let (key, rest) = word(after.trim_start());
        return Ok((Requirement::new(key, Op::NotExists, [""; 0])?, rest));
    }
    let (key, rest) = word(text);
    let rest = rest.trim_start();
    if rest.is_empty() || rest.starts_with(',') {
        return Ok((Requirement::new(key, Op::Exists, [""; 0])?, rest));
    }
    for (sign, op) in [("==", Op::In), ("!=", Op::NotIn), ("=", Op::In)] {
        if let Some(after) = rest.strip_prefix(sign) {
            let (value, rest) = word(after.trim_start());
            return Ok((Requirement::new(key, op, [value])?, rest));
        }
    }
    for (sign, op) in [(">", Op::Greater as fn(i64) -> Op), ("<", Op::Less)] {
        if let Some(after) = rest.strip_prefix(sign) {
            let (value, rest) = word(after.trim_start());
            let number = value.parse().map_err(|_| format!("{value:?} after '{sign}' must be an integer"))?;
            return Ok((Requirement::new(key, op(number), [""; 0])?, rest));
        }
    }
    let (operator, after) = word(rest);
    let op = match operator {
        "in" => Op::In,
        "notin" => Op::NotIn,
        other => return Err(format!("expected one of =, ==, !=, in, notin after {key:?}, found {other:?}")),
    };
    let list = after.trim_start().strip_prefix('(').ok_or_else(|| format!("'(' must follow {operator:?}"))?;
    let (inside, rest) = list.split_once(')').ok_or("')' is missing")?;
    Ok((Requirement::new(key, op, inside.split(',').map(str::trim))?, rest))
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Field {
    Name,
    Namespace,
    /// Position in [`fields_of`].
    Extracted(usize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Term {
    field: Field,
    equal: bool,
    value: Box<str>,
}

/// A field selector for one kind; all terms must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<Term>,
}

impl FieldSelector {
    /// Parses `?fieldSelector=`: `=`, `==` and `!=` terms joined by commas; `\` escapes `,`, `=` and `\` in values.
    /// A field that the kind cannot be selected by is a 400.
    pub fn parse(kind: &Kind, text: &str) -> Result<Self, ApiError> {
        let mut terms = Vec::new();
        for part in split_unescaped(text) {
            if part.is_empty() {
                continue;
            }
            let (field, equal, value) = split_term(part).ok_or_else(|| {
                ApiError::bad_request(format!(
                    "invalid field selector: {part:?}; write <field>=<value>, == or !="
                ))
            })?;
            let field = match field {
                "metadata.name" => Field::Name,
                "metadata.namespace" if kind.namespaced => Field::Namespace,
                _ => {
                    let position = fields_of(kind).iter().position(|f| f.name == field).ok_or_else(|| {
                        ApiError::bad_request(format!("field label not supported: {field}"))
                    })?;
                    Field::Extracted(position)
                }
            };
            terms.push(Term { field, equal, value: unescape(value)?.into_boxed_str() });
        }
        Ok(Self { terms })
    }

    /// Whether every object matches.
    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }

    /// Whether an indexed object of the selector's kind satisfies it.
    pub fn matches(&self, index: &ObjectIndex) -> bool {
        self.terms.iter().all(|term| {
            let value = match term.field {
                Field::Name => &*index.name,
                Field::Namespace => &*index.namespace,
                Field::Extracted(position) => index.field_at(position),
            };
            (value == &*term.value) == term.equal
        })
    }

    /// The one name that can match, when the selector pins `metadata.name`: saves a scan.
    pub fn exact_name(&self) -> Option<&str> {
        self.terms.iter().find(|t| t.field == Field::Name && t.equal).map(|t| &*t.value)
    }

    /// The one namespace that can match, when the selector pins `metadata.namespace`.
    pub fn exact_namespace(&self) -> Option<&str> {
        self.terms.iter().find(|t| t.field == Field::Namespace && t.equal).map(|t| &*t.value)
    }
}

fn split_unescaped(text: &str) -> Vec<&str> {
    let (mut out, mut start, mut escaped) = (Vec::new(), 0, false);
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                out.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    out.push(&text[start..]);
    out
}

fn split_term(part: &str) -> Option<(&str, bool, &str)> {
    let at = part.find('=')?;
    let (left, right) = (&part[..at], &part[at + 1..]);
    if let Some(field) = left.strip_suffix('!') {
        return Some((field.trim(), false, right));
    }
    Some((left.trim(), true, right.strip_prefix('=').unwrap_or(right)))
}

fn unescape(value: &str) -> Result<String, ApiError> {
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(e @ ('\\' | ',' | '=')) => out.push(e),
                _ => {
                    return Err(ApiError::bad_request(format!(
                        "invalid field selector value {value:?}: '\\' may only escape ',', '=' and itself"
                    )));
                }
            },
            '=' => {
                return Err(ApiError::bad_request(format!(
                    "invalid field selector value {value:?}: write '\\=' for '='"
                )));
            }
            _ => out.push(c),
        }
    }
    Ok(out)
}

/// The two selectors of a list or watch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selectors {
    /// By label.
    pub labels: LabelSelector,
    /// By field.
    pub fields: FieldSelector,
}

impl Selectors {
    /// Selects every object.
    pub fn everything() -> Self {
        Self::default()
    }

    /// Parses both query parameters; absent ones select everything.
    pub fn parse(kind: &Kind, labels: Option<&str>, fields: Option<&str>) -> Result<Self, ApiError> {
        Ok(Self {
            labels: labels.map_or_else(|| Ok(LabelSelector::everything()), LabelSelector::parse)?,
            fields: fields.map_or_else(|| Ok(FieldSelector::default()), |f| FieldSelector::parse(kind, f))?,
        })
    }

    /// Whether every object matches.
    pub fn is_everything(&self) -> bool {
        self.labels.is_everything() && self.fields.is_everything()
    }

    /// Whether an indexed object matches both.
    pub fn matches(&self, index: &ObjectIndex) -> bool {
        self.fields.matches(index) && self.labels.matches(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::kinds::{CONFIG_MAPS, NODES, PODS};
    use proptest::prelude::*;
    use serde_json::json;

    fn labels(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn label_strings() {
        let object = labels(json!({"app": "web", "tier": "front", "n": "5", "empty": ""}));
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web", true),
            ("app = web , tier = front", true),
            ("app!=web", false),
            ("other!=web", true),
            ("app in (web, api)", true),
            ("app in (api)", false),
            ("app notin (api,db),tier", true),
            ("other notin (a)", true),
            ("tier", true),
            ("other", false),
            ("!other", true),
            ("! tier", false),
            ("n>4,n<6", true),
            ("n>5", false),
            ("app>1", false),
            ("empty=", true),
            ("app=", false),
            ("empty in (,x)", true),
            ("example.com/x notin (y)", true),
        ] {
            let selector = LabelSelector::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(selector.matches_labels(Some(&object)), expected, "{text}");
        }
    }

    #[test]
    fn bad_label_strings_are_400() {
        for text in [
            "a=b,",
            ",",
            "a b",
            "a in b",
            "a in (b",
            "=b",
            "a>x",
            "-a=b",
            "a=b c=d",
            "a=-",
            "!",
            "a in (b) c",
            "a,,b",
            "a=b=c",
        ] {
            let error = LabelSelector::parse(text).expect_err(text);
            assert_eq!(error.code, 400, "{text}");
            assert!(error.message.contains("label selector"), "{}", error.message);
        }
    }

    #[test]
    fn label_selector_objects() {
        let object = labels(json!({"app": "web", "tier": "front"}));
        let cases = [
            (json!(null), false),
            (json!({}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "api"}}), false),
            (json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}), true),
            (json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}), false),
            (json!({"matchExpressions": [{"key": "app", "operator": "Exists"}]}), true),
            (json!({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}), false),
        ];
        for (selector, expected) in cases {
            let parsed = LabelSelector::from_json(&selector).unwrap();
            assert_eq!(parsed.matches_labels(Some(&object)), expected, "{selector}");
        }
        for bad in [
            json!([]),
            json!({"matchLabels": {"app": 1}}),
            json!({"matchExpressions": [{"key": "a", "operator": "In"}]}),
            json!({"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}),
            json!({"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}),
            json!({"matchExpressions": [{"operator": "Exists"}]}),
        ] {
            assert!(LabelSelector::from_json(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn field_selectors() {
        let pod = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {"nodeName": "a"},
            "status": {"phase": "Running"}});
        let index = ObjectIndex::extract(&PODS, &pod);
        for (text, expected) in [
            ("", true),
            ("metadata.name=p", true),
            ("metadata.name==p,metadata.namespace=n", true),
            ("metadata.name!=p", false),
            ("spec.nodeName=a,status.phase!=Succeeded,status.phase!=Failed", true),
            ("spec.nodeName=", false),
            ("spec.hostNetwork=false", true),
            ("status.podIP=", true),
        ] {
            let selector = FieldSelector::parse(&PODS, text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(selector.matches(&index), expected, "{text}");
        }
        assert_eq!(FieldSelector::parse(&PODS, "metadata.name=p").unwrap().exact_name(), Some("p"));
        let escaped = FieldSelector::parse(&PODS, r"metadata.name=a\,b\=c").unwrap();
        assert_eq!(escaped.exact_name(), Some("a,b=c"));
    }

    #[test]
    fn unknown_fields_are_400() {
        for (kind, text) in [
            (&PODS, "spec.foo=x"),
            (&CONFIG_MAPS, "data=x"),
            (&NODES, "metadata.namespace=x"),
            (&PODS, "metadata.name"),
            (&PODS, "metadata.name=a=b"),
            (&PODS, r"metadata.name=a\b"),
        ] {
            assert_eq!(FieldSelector::parse(kind, text).expect_err(text).code, 400);
        }
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in ".{0,40}") {
            prop_assert!(LabelSelector::parse(&text).map_or_else(|e| e.code == 400, |_| true));
            prop_assert!(FieldSelector::parse(&PODS, &text).map_or_else(|e| e.code == 400, |_| true));
        }

        #[test]
        fn not_in_is_the_complement_of_in(key in "[a-c]", value in "[a-c]", have in proptest::option::of("[a-c]")) {
            let yes = LabelSelector::parse(&format!("{key} in ({value})")).unwrap();
            let no = LabelSelector::parse(&format!("{key} notin ({value})")).unwrap();
            let get = |_: &str| have.as_deref();
            prop_assert_ne!(yes.matches_with(get), no.matches_with(get));
        }
    }
}
