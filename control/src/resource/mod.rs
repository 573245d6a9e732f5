//! The resource rules: kinds, defaulting, validation, life cycle, patches, selectors, tables, discovery and
//! address allocation. Everything here is a synchronous, pure function over JSON values: no clock, no randomness, no
//! I/O, so the HTTP room and the controllers obey the same rules.

pub mod alloc;
mod default;
pub mod discovery;
pub mod error;
pub mod index;
pub mod kinds;
pub mod lifecycle;
pub mod names;
pub mod object;
pub mod openapi;
pub mod patch;
pub mod path;
pub mod quantity;
pub mod selector;
pub mod table;
pub mod types;
mod validate;

pub use default::{default_object, qos_class};
pub use error::{ApiError, Cause, CauseReason, Details};
pub use index::{ObjectIndex, OwnerRef};
pub use kinds::{Kind, Subresource, find, find_by_gvk, kinds};
pub use lifecycle::{
    DeleteOptions, DeleteOutcome, Propagation, Stamp, UpdateOutcome, finish_update, plan_delete,
    prepare_create, prepare_update,
};
pub use patch::{PatchType, apply_patch};
pub use quantity::{Quantity, QuantityError};
pub use selector::{FieldSelector, LabelSelector, Selectors};
pub use types::protobuf;
pub use types::{FieldValidation, conform, unknown_fields};
pub use validate::{validate_create, validate_update};

#[cfg(test)]
mod tests;
