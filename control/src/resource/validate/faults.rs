//! Collects what is wrong with an object, in the words that Kubernetes' clients know.

use std::fmt::Display;

use crate::resource::error::{ApiError, Cause, CauseReason};
use crate::resource::kinds::Kind;
use crate::resource::path::Path;

/// Most causes that one answer names; an object with more is wrong enough.
const CAUSES_MAX: usize = 50;

/// The faults found so far.
#[derive(Default)]
pub(super) struct Faults(Vec<Cause>);

impl Faults {
    fn push(&mut self, reason: CauseReason, path: &Path<'_>, message: String) {
        if self.0.len() < CAUSES_MAX {
            self.0.push(Cause { reason, message, field: path.to_string() });
        }
    }

    /// A field that must be set; `why` may be empty.
    pub(super) fn required(&mut self, path: &Path<'_>, why: &str) {
        let message =
            if why.is_empty() { "Required value".to_owned() } else { format!("Required value: {why}") };
        self.push(CauseReason::Required, path, message);
    }

    /// A value of the wrong form or range.
    pub(super) fn invalid(&mut self, path: &Path<'_>, value: impl Display, why: impl Display) {
        self.push(CauseReason::Invalid, path, format!("Invalid value: {value}: {why}"));
    }

    /// Like [`Faults::invalid`] for text, which is quoted and cut.
    pub(super) fn invalid_text(&mut self, path: &Path<'_>, value: &str, why: impl Display) {
        let shown: String = value.chars().take(128).collect();
        self.invalid(path, format_args!("{shown:?}"), why);
    }

    /// A value outside a closed set.
    pub(super) fn unsupported(&mut self, path: &Path<'_>, value: &str, supported: &[&str]) {
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let shown: String = value.chars().take(128).collect();
        let message = format!("Unsupported value: {shown:?}: supported values: {}", list.join(", "));
        self.push(CauseReason::NotSupported, path, message);
    }

    /// A field that may not be set or changed here.
    pub(super) fn forbidden(&mut self, path: &Path<'_>, why: impl Display) {
        self.push(CauseReason::Forbidden, path, format!("Forbidden: {why}"));
    }

    /// A second appearance.
    pub(super) fn duplicate(&mut self, path: &Path<'_>, value: impl Display) {
        self.push(CauseReason::Duplicate, path, format!("Duplicate value: {value}"));
    }

    /// A name that nothing has.
    pub(super) fn not_found(&mut self, path: &Path<'_>, value: &str) {
        self.push(CauseReason::NotFound, path, format!("Not found: {value:?}"));
    }

    /// More bytes than allowed.
    pub(super) fn too_long(&mut self, path: &Path<'_>, max_bytes: usize) {
        self.push(CauseReason::TooLong, path, format!("Too long: may not be more than {max_bytes} bytes"));
    }

    /// More items than allowed.
    pub(super) fn too_many(&mut self, path: &Path<'_>, count: usize, max: usize) {
        self.push(CauseReason::TooMany, path, format!("Too many: {count}: must have at most {max} items"));
    }

    /// A grammar's verdict on text.
    pub(super) fn check(&mut self, path: &Path<'_>, value: &str, verdict: Result<(), String>) {
        if let Err(why) = verdict {
            self.invalid_text(path, value, why);
        }
    }

    /// One of a closed set, or absent (empty).
    pub(super) fn one_of(&mut self, path: &Path<'_>, value: &str, supported: &[&str]) {
        if !value.is_empty() && !supported.contains(&value) {
            self.unsupported(path, value, supported);
        }
    }

    /// An integer within bounds, when set.
    pub(super) fn range(&mut self, path: &Path<'_>, value: Option<i64>, low: i64, high: i64) {
        if let Some(value) = value
            && !(low..=high).contains(&value)
        {
            if high == i64::MAX {
                self.invalid(path, value, format_args!("must be greater than or equal to {low}"));
            } else {
                self.invalid(path, value, format_args!("must be between {low} and {high}, inclusive"));
            }
        }
    }

    /// The verdict.
    pub(super) fn into_result(self, kind: &Kind, name: &str) -> Result<(), ApiError> {
        if self.0.is_empty() { Ok(()) } else { Err(ApiError::invalid(kind, name, self.0)) }
    }
}
