//! Ring host: whole-program rules that need no privilege. One file a subject.

mod controllers_rollout;
