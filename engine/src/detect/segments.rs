//! Where the log's files are: directories as `pg_wal` or as an archive has them.
//!
//! An archive holds what `archive_command` or pg_receivewal put there: a file for each segment, as it is or compressed with gzip, zstd
//! or lz4; histories of timelines; and `.partial` files, the last segment of a receiver or of a timeline that a promotion ended. What
//! compressed a file is told by its first bytes, since some archives keep the bare name. Of a segment on a timeline the first directory's file is taken,
//! and a partial one only where there is no other.
//!
//! [`WalFiles::walk`] gives the records of a range one by one. Which timeline's file is read for a segment says the history: the
//! youngest that has begun when the segment ends. Each file is opened once and read once, from its front to its back.
//!
//! A backup opens the segments that it may need before it begins, as its own checkpoint lets the server remove them: [`WalFiles::hold`]. What is renamed
//! and written again meanwhile is other WAL, and found to be so.
//!
//! What goes wrong: a segment that is not there, [`WalFiles::first_missing`] says so before anything is read; one that is removed after
//! it was listed, an error that names it; one that is recycled while it is read, or damaged, or of another cluster or timeline, which the
//! [`WalWalker`] finds; one that decompresses to more or less than a segment. A partial file may be short, if what is needed is in it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, ErrorKind::NotFound, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    Lsn, TimelineHistory, TimelineId, WalRecord, WalSegmentName, WalSegmentNumber, WalSegmentSize, WalSource, WalStep,
    WalWalker, parse_history_file_name,
};

/// Bytes read at once.
const READ_LEN: usize = 256 << 10;
/// Bytes of a timeline's history at most; a line is about 60, and there is one for each promotion ever.
const MAX_HISTORY_LEN: u64 = 16 << 20;
const SEGMENT_NAME_LEN: usize = 24;

/// The files of the log that some directories hold.
#[derive(Clone, Debug)]
pub struct WalFiles {
    size: WalSegmentSize,
    /// In the order in which they are to be taken.
    segments: BTreeMap<WalSegmentName, Vec<SegmentFile>>,
    histories: BTreeMap<TimelineId, PathBuf>,
}

#[derive(Clone, Debug)]
struct SegmentFile {
    path: PathBuf,
    is_partial: bool,
    /// Open since before it was removed.
    held: Option<Arc<File>>,
}

/// Segments that were opened in time: a checkpoint, that of a backup's start for one, removes or renames them.
#[derive(Clone, Debug, Default)]
pub struct HeldSegments(Vec<(WalSegmentName, PathBuf, Arc<File>)>);

/// Files that are held open at once, at most: 4 GiB of WAL.
const MAX_HELD: usize = 256;

impl WalFiles {
    /// Lists `directories`, the one to be preferred first.
    ///
    /// # Errors
    /// When one cannot be listed.
    pub fn list(directories: &[&Path], size: WalSegmentSize) -> Result<WalFiles> {
        let mut files = WalFiles { size, segments: BTreeMap::new(), histories: BTreeMap::new() };
        for directory in directories {
            let fail = |e| Error::io("list", directory, e);
            for entry in fs::read_dir(directory).map_err(fail)? {
                files.add(&entry.map_err(fail)?.path());
            }
        }
        files.segments.values_mut().for_each(|found| found.sort_by_key(|file| file.is_partial));
        Ok(files)
    }

    fn add(&mut self, path: &Path) {
        let Some(name) = path.file_name().map(|name| name.as_encoded_bytes()) else { return };
        if let Some((name, is_partial)) = segment_file_name(name, self.size) {
            let file = SegmentFile { path: path.to_owned(), is_partial, held: None };
            self.segments.entry(name).or_default().push(file);
        } else if let Some(timeline) = parse_history_file_name(without_compression(name)) {
            self.histories.entry(timeline).or_insert_with(|| path.to_owned());
        }
    }

    /// Opens the segments of plain files from the one of `start` on, the oldest first, but no more than a process may have open.
    pub fn hold(&self, start: Lsn) -> HeldSegments {
        let first = self.size.segment_of(start);
        let mut wanted: Vec<_> = self.segments.iter().filter(|(name, _)| name.segment >= first).collect();
        wanted.sort_unstable_by_key(|(name, _)| name.segment);
        let held = wanted.into_iter().take(MAX_HELD).filter_map(|(name, files)| {
            let file = files.iter().find(|file| !file.is_partial)?;
            // One that is gone by now is not held.
            Some((*name, file.path.clone(), Arc::new(File::open(&file.path).ok()?)))
        });
        HeldSegments(held.collect())
    }

    /// The same files, and those held that are not among them any more.
    pub fn with(mut self, held: &HeldSegments) -> WalFiles {
        for (name, path, file) in &held.0 {
            let held = Some(Arc::clone(file));
            let again = SegmentFile { path: path.clone(), is_partial: false, held };
            self.segments.entry(*name).or_default().push(again);
        }
        self.segments.values_mut().for_each(|found| found.sort_by_key(|file| file.is_partial));
        self
    }

    /// The history of `timeline`; one without a file has no ancestors.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn history(&self, timeline: TimelineId) -> Result<TimelineHistory> {
        let Some(path) = self.histories.get(&timeline) else { return Ok(TimelineHistory::without_ancestors(timeline)) };
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let mut bytes = Vec::new();
        let input = Input::new(file).map_err(|e| cannot_read(path, e))?;
        input.take(MAX_HISTORY_LEN).read_to_end(&mut bytes).map_err(|e| cannot_read(path, e))?;
        TimelineHistory::parse(timeline, &bytes)
    }

    /// How many segments there are, whole or in part.
    pub fn segment_count(&self) -> usize {
        self.segments.len()
    }

    /// The first segment of those from `start` to `end` along `history` of which there is no file.
    pub fn first_missing(&self, history: &TimelineHistory, start: Lsn, end: Lsn) -> Option<WalSegmentName> {
        let (first, last) = (self.size.segment_of(start), self.size.segment_before(end));
        let numbers = (first.as_u64()..=last.as_u64()).map(WalSegmentNumber::new);
        let mut names = numbers.map(|number| history.segment_name(number, self.size));
        names.find(|name| !self.segments.contains_key(name))
    }

    /// Calls `each` for every record that begins in the range, in order, until it fails.
    ///
    /// # Errors
    /// Missing: there is no file of a segment; Corrupt: the log is broken before its end; those of `each`.
    pub fn walk(
        &self,
        source: WalSource,
        start: Lsn,
        end: Lsn,
        mut each: impl FnMut(WalRecord<'_>) -> Result<()>,
    ) -> Result<()> {
        let history = source.history.clone();
        let mut walker = WalWalker::new(source, start, end)?;
        let mut open: Option<OpenSegment> = None;
        let mut buffer = vec![0; READ_LEN];
        loop {
            let at = match walker.step()? {
                WalStep::Record(record) => {
                    each(record)?;
                    continue;
                }
                WalStep::Finished => return open.map_or(Ok(()), OpenSegment::finish),
                WalStep::NeedBytes { at } => at,
            };
            let name = history.segment_name(self.size.segment_of(at), self.size);
            if open.as_ref().is_none_or(|open| open.name != name) {
                open.take().map_or(Ok(()), OpenSegment::finish)?;
            }
            let segment = match &mut open {
                Some(segment) => segment,
                none => none.insert(self.open(name)?),
            };
            let len = segment.read_at(self.size.offset_of(at), &mut buffer)?;
            walker.feed(&buffer[..len]);
        }
    }

    /// The bytes of a segment's file, decompressed; `None` if there is none.
    ///
    /// # Errors
    /// When it cannot be read, or has another length.
    pub(crate) fn read(&self, name: WalSegmentName) -> Result<Option<Vec<u8>>> {
        if !self.segments.contains_key(&name) {
            return Ok(None);
        }
        let mut segment = match self.open(name) {
            Err(error) if error.kind() == ErrorKind::Missing => return Ok(None),
            opened => opened?,
        };
        let mut bytes = vec![0; usize::try_from(self.size.as_u64()).map_err(|_| Error::bug("a segment of 4 GiB"))?];
        let mut len = 0;
        while len < bytes.len() {
            len += segment.read_at(len as u64, &mut bytes[len..])?;
        }
        Ok(Some(bytes))
    }

    fn open(&self, name: WalSegmentName) -> Result<OpenSegment> {
        for file in self.segments.get(&name).into_iter().flatten() {
            let opened = match &file.held {
                Some(held) => held.try_clone(),
                None => File::open(&file.path),
            };
            match opened {
                Ok(opened) => return OpenSegment::new(name, self.size, file, opened),
                Err(error) if error.kind() == NotFound => {}
                Err(error) => return Err(Error::io("open", &file.path, error)),
            }
        }
        let what = format!("the WAL file {} is not there", name.file_name(self.size));
        Err(Error::new(ErrorKind::Missing, what).hint("say where the WAL archive is (--wal-archive), if there is one"))
    }
}

/// The segment that a file's name says it is, and whether only a part of it.
fn segment_file_name(name: &[u8], size: WalSegmentSize) -> Option<(WalSegmentName, bool)> {
    let (digits, suffix) = name.split_at_checked(SEGMENT_NAME_LEN)?;
    // pg_receivewal writes `.gz.partial`, an archive_command that compresses `.partial.gz`.
    let suffix = without_compression(suffix);
    let (suffix, is_partial) = match suffix.strip_suffix(b".partial") {
        Some(suffix) => (without_compression(suffix), true),
        None => (suffix, false),
    };
    let segment = WalSegmentName::parse(digits, size)?;
    suffix.is_empty().then_some((segment, is_partial))
}

fn without_compression(name: &[u8]) -> &[u8] {
    let suffixes: [&[u8]; 3] = [b".gz", b".zst", b".lz4"];
    suffixes.iter().find_map(|suffix| name.strip_suffix(*suffix)).unwrap_or(name)
}

fn cannot_read(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::InvalidData
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::UnexpectedEof
        | io::ErrorKind::Other => {
            Error::corrupt(path.display().to_string(), "the file does not decompress").because(error)
        }
        _ => Error::io("read", path, error),
    }
}

/// The bytes of a file, decompressed.
enum Input {
    Plain(File),
    Gzip(Box<flate2::read::MultiGzDecoder<BufReader<File>>>),
    Zstd(Box<zstd::Decoder<'static, BufReader<File>>>),
    Lz4(Box<lz4_flex::frame::FrameDecoder<BufReader<File>>>),
}

impl Input {
    /// Looks at the first bytes of a file.
    fn new(mut file: File) -> io::Result<Input> {
        let mut magic = Vec::new();
        file.rewind()?;
        file.by_ref().take(4).read_to_end(&mut magic)?;
        file.rewind()?;
        Ok(match magic.as_slice() {
            [0x1F, 0x8B, ..] => Input::Gzip(Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(file)))),
            [0x28, 0xB5, 0x2F, 0xFD] => Input::Zstd(Box::new(zstd::Decoder::new(file)?)),
            [0x04, 0x22, 0x4D, 0x18] => Input::Lz4(Box::new(lz4_flex::frame::FrameDecoder::new(BufReader::new(file)))),
            _ => Input::Plain(file),
        })
    }

    /// Passes over `len` bytes; those of a compressed file have to be decompressed.
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        match self {
            Input::Plain(file) => {
                let len = i64::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
                file.seek(SeekFrom::Current(len)).map(|_| len.unsigned_abs())
            }
            compressed => io::copy(&mut compressed.take(len), &mut io::sink()),
        }
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Input::Plain(file) => file.read(buffer),
            Input::Gzip(decoder) => decoder.read(buffer),
            Input::Zstd(decoder) => decoder.read(buffer),
            Input::Lz4(decoder) => decoder.read(buffer),
        }
    }
}

/// A segment's file that is being read.
struct OpenSegment {
    name: WalSegmentName,
    path: PathBuf,
    is_partial: bool,
    size: u64,
    input: Input,
    /// How much of the segment was passed.
    position: u64,
}

impl OpenSegment {
    fn new(name: WalSegmentName, size: WalSegmentSize, file: &SegmentFile, opened: File) -> Result<OpenSegment> {
        let path = file.path.clone();
        let len = opened.metadata().map_err(|e| Error::io("examine", &path, e))?.len();
        let input = Input::new(opened).map_err(|e| cannot_read(&path, e))?;
        let (is_partial, size) = (file.is_partial, size.as_u64());
        let segment = OpenSegment { name, path, is_partial, size, input, position: 0 };
        let is_plain = matches!(segment.input, Input::Plain(_));
        if is_plain && (len > size || len < size && !is_partial) {
            return Err(segment.wrong_len(len));
        }
        Ok(segment)
    }

    /// Reads from `offset` on, which is never before what was read.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let ahead = offset.checked_sub(self.position);
        let ahead = ahead.ok_or_else(|| Error::bug("WAL is read again").at(self.path.display().to_string()))?;
        if ahead > 0 {
            self.position += self.input.skip(ahead).map_err(|e| cannot_read(&self.path, e))?;
        }
        let room = usize::try_from(self.size - offset).unwrap_or(usize::MAX).min(buffer.len());
        let len = self.input.read(&mut buffer[..room]).map_err(|e| cannot_read(&self.path, e))?;
        if len == 0 || self.position < offset {
            return Err(self.wrong_len(self.position));
        }
        self.position += len as u64;
        Ok(len)
    }

    /// Sees that what was decompressed is a segment, no less and no more.
    fn finish(mut self) -> Result<()> {
        if matches!(self.input, Input::Plain(_)) || self.is_partial {
            return Ok(());
        }
        let beyond = self.size + 1 - self.position;
        let rest = self.input.skip(beyond).map_err(|e| cannot_read(&self.path, e))?;
        let len = self.position + rest;
        if len == self.size { Ok(()) } else { Err(self.wrong_len(len)) }
    }

    fn wrong_len(&self, len: u64) -> Error {
        let more = if len > self.size { " or more" } else { "" };
        let what = format!("the WAL file has {len} bytes{more}, not {}", self.size);
        Error::corrupt(self.path.display().to_string(), what)
    }
}

#[cfg(test)]
mod tests;
