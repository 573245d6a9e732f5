//! What the API says, as compact models. No typed API object outlives the function that decoded it.

pub mod services;
