//! The ports that petek listens on where nothing else is said.

/// A router's public services.
pub(crate) const PUBLIC: u16 = 7411;
/// A router's admin services.
pub(crate) const ADMIN: u16 = 7412;
/// A worker's services, for routers.
pub(crate) const WORKER: u16 = 7413;
/// Metrics and health of any process.
pub(crate) const OPS: u16 = 7414;

// One machine may run one of each.
const _: () = assert!(PUBLIC < ADMIN && ADMIN < WORKER && WORKER < OPS);
