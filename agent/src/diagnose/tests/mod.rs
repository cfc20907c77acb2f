//! The diagnosis on scenes made by hand: what one thread does, what many do, where a trail leads, what the verdict is.

mod classify;
mod explain;
mod profile;
mod scene;
mod verdicts;
mod wait_graph;
