use super::Found;
use super::Set;
use crate::compare::CompareArgs;
use crate::compare::site::Site;
pub(super) fn find(_: &CompareArgs, _: &Site, _: Set) -> Found {
    Err("later".to_owned())
}
