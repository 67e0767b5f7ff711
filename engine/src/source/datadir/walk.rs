//! The walk through a data directory, in the order of the paths.
//!
//! Paths are ordered by their bytes, and a slash comes after a dot and before the digits: `a`, `a.1`, `a/1`, `a1`. So the names in a directory are
//! taken in order, and what is in a subdirectory `a` has its turn when the names before `a/` have had theirs. Nothing is sorted at the end, and all
//! that is held besides the entries are the names of the directories at hand.
//!
//! What goes wrong: as in the [room](super); and a tablespace that is not where its link was, by which the paths would not be in order.

use std::collections::{BTreeMap, HashSet};

use super::*;

/// The state of one walk.
pub(super) struct Walk<'a> {
    data_dir: &'a DataDir,
    tablespaces: &'a [Tablespace],
    /// Directories that are listed as tablespaces, and so not again where they lie in the data directory.
    of_tablespaces: HashSet<Identity>,
    /// Directories that a symbolic link led to; each is followed once.
    followed: HashSet<Identity>,
    /// What was found.
    pub entries: Entries,
    /// What was left out.
    pub notices: Vec<String>,
}

/// A directory that was listed itself, and whose contents have their turn later.
enum Waiting {
    /// In the directory that is being read.
    Inner { identity: Identity, is_link: bool },
    /// Of a tablespace.
    Tablespace { root: OwnedFd, identity: Identity },
    /// The WAL directory, whose contents are not its own.
    Wal(Box<Stat>),
}

/// Directories whose contents wait, by their names with a slash.
type Queue = BTreeMap<Vec<u8>, Waiting>;

impl<'a> Walk<'a> {
    /// A walk that lists `tablespaces` besides the data directory.
    pub fn new(data_dir: &'a DataDir, tablespaces: &'a [Tablespace]) -> Result<Self> {
        let mut of_tablespaces = HashSet::new();
        for tablespace in tablespaces {
            let opened = open_tablespace(tablespace)?;
            of_tablespaces.extend(opened.map(|(_, stat)| Identity::of(&stat)));
        }
        let (followed, entries, notices) = (HashSet::new(), Entries::default(), Vec::new());
        Ok(Self { data_dir, tablespaces, of_tablespaces, followed, entries, notices })
    }

    fn fail(&self, verb: &str, relative: &[u8], errno: Errno) -> Error {
        Error::io(verb, &self.data_dir.path.join(OsStr::from_bytes(relative)), errno.into())
    }

    fn notice(&mut self, what: &str, relative: &[u8]) {
        self.notices.push(format!("{what} is not backed up: {}", relative.escape_ascii()));
    }

    fn add(&mut self, relative: &[u8], kind: EntryKind, stat: &Stat) -> Result<()> {
        if self.entries.push(relative, kind, stat.st_mode & 0o7777, stat.st_uid, stat.st_gid) {
            return Ok(());
        }
        Err(Error::bug(format!("{} was listed out of order", relative.escape_ascii())))
    }

    /// Lists what is in a directory, which `ancestors` ends with.
    pub fn directory(&mut self, directory: &OwnedFd, relative: &[u8], ancestors: &mut Vec<Identity>) -> Result<()> {
        let mut names = match Names::read(directory) {
            Ok(names) => names,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(self.fail("list", relative, errno)),
        };
        let place = Place::of(relative, &self.data_dir.tablespace_version_dir);
        if place == Place::TablespaceLinks {
            // Those that were found at first: nobody looked for the directories of others.
            names.retain(|name| tablespace_oid(name).is_none());
            let mut listed = self.tablespaces.iter().map(|tablespace| tablespace.oid.to_string());
            let added = listed.try_for_each(|name| names.try_push(name.as_bytes()));
            added.map_err(|errno| self.fail("list", relative, errno))?;
        }
        names.sort();
        let unlogged = if place.has_relations() { relations_with_init_fork(&names) } else { HashSet::new() };
        let mut queue = Queue::new();
        for name in names.iter() {
            while let Some(next) = queue.first_entry().filter(|next| next.key().as_slice() < name) {
                let (next, waiting) = next.remove_entry();
                self.contents(directory, relative, &next, waiting, ancestors)?;
            }
            if is_excluded_name(name) || place == Place::Database && is_temp_relation_file_name(name) {
                continue;
            }
            let relation = parse_relation_file_name(name).filter(|(_, fork, _)| *fork != ForkNumber::Init);
            if let Some((relation, ..)) = relation.filter(|(relation, ..)| unlogged.contains(relation))
                && self.has_init_fork(directory, relation, relative)?
            {
                continue;
            }
            let path = join(relative, name);
            let waiting = match tablespace_oid(name).filter(|_| place == Place::TablespaceLinks) {
                Some(oid) => self.tablespace(oid, &path)?,
                None => self.child(directory, &path, name, ancestors)?,
            };
            queue.extend(waiting.map(|waiting| ([name, b"/"].concat(), waiting)));
        }
        let mut rest = queue.into_iter();
        rest.try_for_each(|(name, waiting)| self.contents(directory, relative, &name, waiting, ancestors))
    }

    /// Lists a tablespace's directory.
    fn tablespace(&mut self, oid: TablespaceOid, relative: &[u8]) -> Result<Option<Waiting>> {
        let Some(tablespace) = self.tablespaces.iter().find(|tablespace| tablespace.oid == oid) else {
            return Ok(None);
        };
        let Some((root, stat)) = open_tablespace(tablespace)? else { return Ok(None) };
        self.add(relative, EntryKind::Directory, &stat)?;
        let identity = Identity::of(&stat);
        self.of_tablespaces.insert(identity);
        Ok(Some(Waiting::Tablespace { root, identity }))
    }

    /// Lists what is in a directory that waited, of that name with a slash in the directory `parent`.
    fn contents(
        &mut self,
        parent: &OwnedFd,
        relative: &[u8],
        name: &[u8],
        waiting: Waiting,
        ancestors: &mut Vec<Identity>,
    ) -> Result<()> {
        let name = name.strip_suffix(b"/").unwrap_or(name);
        let relative = join(relative, name);
        match waiting {
            Waiting::Wal(stat) => self.wal_directory(&relative, &stat),
            Waiting::Inner { identity, is_link } => {
                let no_follow = if is_link { OFlags::empty() } else { OFlags::NOFOLLOW };
                let directory = match open_directory(parent.as_fd(), name, no_follow) {
                    Ok(directory) => directory,
                    Err(Errno::NOENT) => return Ok(()),
                    Err(errno) => return Err(self.fail("open", &relative, errno)),
                };
                ancestors.push(identity);
                let listed = self.directory(&directory, &relative, ancestors);
                ancestors.pop();
                listed
            }
            Waiting::Tablespace { root, identity } => {
                // Below it what is ours, and nothing else.
                let version_dir = self.data_dir.tablespace_version_dir.clone().into_bytes();
                let mut ancestors = vec![self.data_dir.identity, identity];
                let ours = self.child(&root, &join(&relative, &version_dir), &version_dir, &ancestors)?;
                ours.map_or(Ok(()), |ours| self.contents(&root, &relative, &version_dir, ours, &mut ancestors))
            }
        }
    }

    fn has_init_fork(&self, directory: &OwnedFd, relation: RelFileNumber, relative: &[u8]) -> Result<bool> {
        match statat(directory, format!("{relation}_init"), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(self.fail("look at the init fork of a relation in", relative, errno)),
        }
    }

    /// Lists what has a name in a directory; the contents of a directory wait.
    fn child(
        &mut self,
        parent: &OwnedFd,
        relative: &[u8],
        name: &[u8],
        ancestors: &[Identity],
    ) -> Result<Option<Waiting>> {
        let own = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(self.fail("look at", relative, errno)),
        };
        let is_link = is(&own, FileType::Symlink);
        let stat = if is_link {
            match statat(parent, name, AtFlags::empty()) {
                Ok(stat) => stat,
                // As of a tmpfs that was not set up again; the server still wants the directory.
                Err(Errno::NOENT) if EMPTIED_DIRECTORIES.contains(&name) => {
                    let mut stat = own;
                    stat.st_mode = 0o700;
                    self.add(relative, EntryKind::Directory, &stat)?;
                    return Ok(None);
                }
                Err(Errno::NOENT | Errno::LOOP) => {
                    self.notice("a symbolic link that leads nowhere", relative);
                    return Ok(None);
                }
                Err(errno) => return Err(self.fail("follow the symbolic link", relative, errno)),
            }
        } else {
            own
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => self.add(relative, EntryKind::File { len: length(&stat) }, &stat)?,
            FileType::Directory if relative == b"pg_wal" => {
                self.add(relative, EntryKind::Directory, &stat)?;
                return Ok(Some(Waiting::Wal(Box::new(stat))));
            }
            FileType::Directory if EMPTIED_DIRECTORIES.contains(&name) => {
                self.add(relative, EntryKind::Directory, &stat)?;
            }
            FileType::Directory => return self.subdirectory(relative, &stat, is_link, ancestors),
            _ => self.notice("a special file", relative),
        }
        Ok(None)
    }

    fn wal_directory(&mut self, relative: &[u8], stat: &Stat) -> Result<()> {
        self.add(&join(relative, b"archive_status"), EntryKind::Directory, stat)?;
        if self.data_dir.major.as_u32() >= 17 {
            self.add(&join(relative, b"summaries"), EntryKind::Directory, stat)?;
        }
        Ok(())
    }

    fn subdirectory(
        &mut self,
        relative: &[u8],
        stat: &Stat,
        is_link: bool,
        ancestors: &[Identity],
    ) -> Result<Option<Waiting>> {
        let identity = Identity::of(stat);
        if is_link && !is_kept_by_postgresql(relative) {
            // It may lead anywhere: to the repository itself, or to the whole host.
            self.notice("a symbolic link to a directory, where PostgreSQL keeps nothing", relative);
            return Ok(None);
        }
        if is_link && (ancestors.contains(&identity) || !self.followed.insert(identity)) {
            self.notice("a symbolic link to a directory that is backed up under another name", relative);
            return Ok(None);
        }
        self.add(relative, EntryKind::Directory, stat)?;
        let is_listed = self.of_tablespaces.contains(&identity);
        Ok((!is_listed).then_some(Waiting::Inner { identity, is_link }))
    }
}

/// A tablespace's directory; `None` if it was dropped.
fn open_tablespace(tablespace: &Tablespace) -> Result<Option<(OwnedFd, Stat)>> {
    let path = tablespace.directory.as_os_str().as_bytes();
    let root = match open_directory(CWD, path, OFlags::empty()) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(Error::io("open", &tablespace.directory, errno.into())),
    };
    let stat = fstat(&root).map_err(|errno| Error::io("look at", &tablespace.directory, errno.into()))?;
    Ok(Some((root, stat)))
}

/// Whether a path is in a directory of PostgreSQL's own: `base`, `global`, or one whose name begins with `pg_`.
fn is_kept_by_postgresql(relative: &[u8]) -> bool {
    let first = relative.split(|&byte| byte == b'/').next().unwrap_or_default();
    matches!(first, b"base" | b"global") || first.starts_with(b"pg_")
}

/// What kind of names a directory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// `pg_tblspc`.
    TablespaceLinks,
    /// `global`: relations, but never temporary ones.
    Global,
    /// A database's directory.
    Database,
    /// Any other.
    Other,
}

impl Place {
    fn of(relative: &[u8], tablespace_version_dir: &str) -> Self {
        let is_number = |name: &[u8]| !name.is_empty() && name.iter().all(u8::is_ascii_digit);
        let parts: Vec<_> = relative.split(|&byte| byte == b'/').collect();
        match &*parts {
            [b"pg_tblspc"] => Self::TablespaceLinks,
            [b"global"] => Self::Global,
            [b"base", database] if is_number(database) => Self::Database,
            [b"pg_tblspc", tablespace, version, database]
                if is_number(tablespace) && *version == tablespace_version_dir.as_bytes() && is_number(database) =>
            {
                Self::Database
            }
            _ => Self::Other,
        }
    }

    fn has_relations(self) -> bool {
        matches!(self, Self::Global | Self::Database)
    }
}

fn is_excluded_name(name: &[u8]) -> bool {
    EXCLUDED_FILES.contains(&name) || EXCLUDED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The relations that had an init fork when the directory was read: only these are looked at again.
fn relations_with_init_fork(names: &Names) -> HashSet<RelFileNumber> {
    let parsed = names.iter().filter_map(parse_relation_file_name);
    parsed.filter(|(_, fork, _)| *fork == ForkNumber::Init).map(|(relation, ..)| relation).collect()
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

/// The names in a directory, of which there may be a million.
#[derive(Default)]
pub(super) struct Names {
    bytes: Vec<u8>,
    /// Where each begins and ends in `bytes`.
    places: Vec<(u32, u32)>,
}

impl Names {
    /// All names in a directory; a directory that cannot be read to its end is an error.
    pub fn read(directory: &OwnedFd) -> rustix::io::Result<Self> {
        let mut names = Self::default();
        for entry in Dir::read_from(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.try_push(name)?;
            }
        }
        Ok(names)
    }

    /// Adds a name; the error of a directory that is too large if there are 4 GB of them.
    fn try_push(&mut self, name: &[u8]) -> rustix::io::Result<()> {
        let place = |at: usize| u32::try_from(at).map_err(|_| Errno::FBIG);
        let begin = place(self.bytes.len())?;
        self.bytes.extend_from_slice(name);
        self.places.push((begin, place(self.bytes.len())?));
        Ok(())
    }

    fn name(bytes: &[u8], (begin, end): (u32, u32)) -> &[u8] {
        &bytes[begin as usize..end as usize]
    }

    /// The names.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.places.iter().map(|place| Self::name(&self.bytes, *place))
    }

    fn retain(&mut self, wanted: impl Fn(&[u8]) -> bool) {
        let bytes = &self.bytes;
        self.places.retain(|place| wanted(Self::name(bytes, *place)));
    }

    fn sort(&mut self) {
        let bytes = &self.bytes;
        self.places.sort_unstable_by(|a, b| Self::name(bytes, *a).cmp(Self::name(bytes, *b)));
    }
}
