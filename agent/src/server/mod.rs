//! What the agent answers over HTTP: health and metrics in clear text, logs over https to clients
//! that the cluster's CA vouches for.
