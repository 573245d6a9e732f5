//! The laws of the tree that no compiler knows, as a check and as a test.

use anyhow::Result;

pub(crate) fn main() -> Result<()> {
    Ok(())
}
