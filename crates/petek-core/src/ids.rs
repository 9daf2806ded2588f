//! The names of things: newtypes, so that a slot is never taken for a block.

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A sequence's place in the runner; there is a fixed number of them.
    SlotId(u32)
}
number! {
    /// A unit of the paged KV cache: a fixed number of token slots, all layers.
    BlockId(u32)
}
number! {
    /// Counts an engine's requests from its start, up by one: the engine's own handle of a request.
    RequestNumber(u64)
}
number! {
    /// Counts an engine's steps from its start, up by one.
    StepNumber(u64)
}
number! {
    /// A random number of one engine start: what happened before it is not what happens now.
    Epoch(u64)
}

/// A token of the model's vocabulary. An alias, for token ids travel by the million between tokeniser, wire, engine
/// and device, all of which say u32.
pub type TokenId = u32;
