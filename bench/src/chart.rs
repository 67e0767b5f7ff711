//! Charts as SVG text that needs nothing but itself: bars with whiskers, and lines.
//!
//! Plotters draws them. What is decided here is what a reader meets: each tool has one colour in all charts, of a palette that
//! colour-blind people can tell apart (Okabe and Ito), pgstrata's the blue, and what bounds everybody grey. Each tool has marks of its own
//! shape, too, so that lines that coincide are seen; several lines of one tool have filled ones, hollow ones and crosses. Names stand beside
//! bars and at the ends of lines, not in a legend. Bars begin at zero. Every axis says its unit, and ticks are at 1, 2 and 5 times powers of
//! ten.
//!
//! Axes are our own ([`Axis`]): the library's logarithmic ones have too few ticks within a decade, and no place for a zero. A zero, where it
//! means something (nothing changed), gets a place of its own, a decade below the least value.
//!
//! The text's size is only estimated, since no font is read: a name of 51 letters fits; a longer one is cut.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use testdata::{Error, Result};

use crate::report::Spread;
use crate::runs::{LIMIT, OURS};

/// Pixels; the page shows it so, or smaller.
const WIDTH: u32 = 900;
const LINES_HEIGHT: i32 = 380;
const ROW_HEIGHT: i32 = 26;
const BAR_HEIGHT: f64 = 0.62;
/// Room for the names of bars, and at the ends of lines.
const NAMES_WIDTH: i32 = 340;
const LABEL_GAP: i32 = 18;
const AXIS_HEIGHT: i32 = 46;
const TOP: i32 = 6;
const FONT: &str = "sans-serif";
/// Plotters' unit: in the picture it is four fifths of that, in pixels.
const TEXT_SIZE: f64 = 16.0;
const LONGEST_NAME: usize = 51;
/// Ticks of a logarithmic axis at most; if there were more, they are at powers of ten only.
const MOST_TICKS: usize = 12;
/// What two numbers that are the same differ by at most, as a factor.
const EXACT: f64 = 1.0 - 1e-9;
const DARK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FAINT: RGBColor = RGBColor(0xDD, 0xDD, 0xDD);

/// A tool's colour and mark; tools that are not here share the last ones.
const TOOLS: [(&str, RGBColor, &[Pixel]); 8] = [
    (OURS, RGBColor(0x00, 0x72, 0xB2), DISC),
    ("pg_basebackup", RGBColor(0xE6, 0x9F, 0x00), SQUARE),
    ("pg_combinebackup", RGBColor(0xE6, 0x9F, 0x00), SQUARE),
    ("pgbackrest", RGBColor(0xD5, 0x5E, 0x00), TRIANGLE),
    ("wal-rus", RGBColor(0xCC, 0x79, 0xA7), DIAMOND),
    ("barman", RGBColor(0x00, 0x9E, 0x73), UPSIDE_DOWN),
    (LIMIT, RGBColor(0x99, 0x99, 0x99), DISC),
    ("pgbench", RGBColor(0x99, 0x99, 0x99), DISC),
];
const OTHERS: (RGBColor, &[Pixel]) = (RGBColor(0x56, 0xB4, 0xE9), SQUARE);
/// Corners of the marks, from their middles.
const DISC: &[Pixel] = &[(-2, -4), (2, -4), (4, -2), (4, 2), (2, 4), (-2, 4), (-4, 2), (-4, -2)];
const SQUARE: &[Pixel] = &[(-4, -4), (4, -4), (4, 4), (-4, 4)];
const TRIANGLE: &[Pixel] = &[(0, -6), (5, 3), (-5, 3)];
const UPSIDE_DOWN: &[Pixel] = &[(0, 6), (5, -3), (-5, -3)];
const DIAMOND: &[Pixel] = &[(0, -5), (5, 0), (0, 5), (-5, 0)];

fn look(tool: &str) -> (RGBColor, &'static [Pixel]) {
    TOOLS.iter().find(|(name, ..)| *name == tool).map_or(OTHERS, |(_, colour, mark)| (*colour, *mark))
}

/// A place in the picture, in pixels from the left and from the top.
type Pixel = (i32, i32);

/// A row of a bar chart.
pub struct Bar {
    /// Its name.
    pub name: String,
    /// Whose it is.
    pub tool: String,
    /// One value for each column, if it has that.
    pub values: Vec<Option<Spread>>,
}

/// Bars, a row for each and a plot for each of the columns, which are named with their units.
///
/// # Errors
/// `Bug`, of the library that draws.
pub fn bars(columns: &[&str], rows: &[Bar]) -> Result<String> {
    let height = TOP + ROW_HEIGHT * i32::try_from(rows.len()).unwrap_or(0) + AXIS_HEIGHT;
    draw((WIDTH, height.unsigned_abs()), |area| {
        for (row, bar) in (0..).zip(rows) {
            let middle = TOP + ROW_HEIGHT * row + ROW_HEIGHT / 2;
            area.draw(&Text::new(cut(&bar.name), (NAMES_WIDTH - 8, middle), text(HPos::Right)))?;
        }
        let (_, plots) = area.split_horizontally(NAMES_WIDTH);
        for (index, (plot, column)) in plots.split_evenly((1, columns.len())).iter().zip(columns).enumerate() {
            let of = |bar: &Bar| Some((bar.values.get(index).copied().flatten()?, look(&bar.tool).0));
            bar_plot(plot, column, &rows.iter().map(of).collect::<Vec<_>>())?;
        }
        Ok(())
    })
}

fn bar_plot(area: &Area<'_>, title: &str, bars: &[Option<(Spread, RGBColor)>]) -> Drawn {
    let greatest = bars.iter().flatten().map(|(spread, _)| spread.max).fold(0.0, f64::max);
    // The value stands behind the bar.
    let axis = Axis::linear(if greatest > 0.0 { greatest * 1.25 } else { 1.0 });
    let mut chart = ChartBuilder::on(area)
        .margin_top(TOP)
        .margin_right(12)
        .x_label_area_size(AXIS_HEIGHT)
        .build_cartesian_2d(axis, (bars.len() as f64)..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(DARK)
        .x_desc(title)
        .label_style(text(HPos::Center))
        .axis_desc_style(text(HPos::Center))
        .draw()?;
    for (row, bar) in bars.iter().enumerate() {
        let Some((spread, colour)) = bar else { continue };
        let middle = row as f64 + 0.5;
        let (top, bottom) = (middle - BAR_HEIGHT / 2.0, middle + BAR_HEIGHT / 2.0);
        chart.draw_series([Rectangle::new([(0.0, top), (spread.median, bottom)], colour.filled())])?;
        chart.draw_series(whisker(spread).map(|line| {
            let placed = line.map(|(along, across)| (along, middle + across * BAR_HEIGHT / 4.0));
            PathElement::new(placed.to_vec(), DARK.stroke_width(1))
        }))?;
        let value = EmptyElement::at((spread.max, middle)) + Text::new(number(spread.median), (6, 0), text(HPos::Left));
        chart.draw_series([value])?;
    }
    Ok(())
}

/// The lines of a whisker from the least to the greatest value: along the value, and across from -1 to 1. None, where there is one value.
fn whisker(spread: &Spread) -> impl Iterator<Item = [(f64, f64); 2]> + use<> {
    let Spread { min, max, .. } = *spread;
    let lines = [[(min, 0.0), (max, 0.0)], [(min, -1.0), (min, 1.0)], [(max, -1.0), (max, 1.0)]];
    lines.into_iter().filter(move |_| max > min)
}

/// A line of a line chart.
pub struct Line {
    /// Its name.
    pub name: String,
    /// Whose it is.
    pub tool: String,
    /// Values along the horizontal axis, ascending, with what is told of each.
    pub points: Vec<(f64, Spread)>,
}

/// How an axis is divided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// From zero.
    Linear,
    /// By powers of ten; a zero has a place of its own.
    Logarithmic,
}

/// Lines, with whiskers at their points; axes are named with their units.
///
/// # Errors
/// `Bug`, of the library that draws.
pub fn lines(along: (&str, Scale), up: (&str, Scale), lines: &[Line]) -> Result<String> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let x = Axis::of(along.1, points().map(|(x, _)| *x));
    let y = Axis::of(up.1, points().flat_map(|(_, spread)| [spread.min, spread.max]));
    let names_height = LABEL_GAP * i32::try_from(lines.len()).unwrap_or(0) + TOP;
    let height = LINES_HEIGHT.max(names_height + AXIS_HEIGHT);
    draw((WIDTH, height.unsigned_abs()), |area| {
        let (plot, _) = area.split_horizontally(WIDTH as i32 - NAMES_WIDTH);
        let mut chart = ChartBuilder::on(&plot)
            .margin_top(14)
            .margin_right(14)
            .margin_left(4)
            .x_label_area_size(AXIS_HEIGHT)
            .y_label_area_size(66)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(FAINT)
            .axis_style(DARK)
            .x_desc(along.0)
            .y_desc(up.0)
            .label_style(text(HPos::Center))
            .axis_desc_style(text(HPos::Center))
            .draw()?;
        let mut names = Vec::new();
        // Where lines coincide, ours lies above.
        let is_ours = |line: &Line| line.tool == OURS;
        let others = lines.iter().enumerate().filter(|(_, line)| !is_ours(line));
        for (index, line) in others.chain(lines.iter().enumerate().filter(|(_, line)| is_ours(line))) {
            let style = Style::of(lines, index);
            let end = draw_line(area, |along, up| chart.backend_coord(&(along, up)), line, style)?;
            names.extend(end.map(|end| Name { text: cut(&line.name), style, end, at: end.1 }));
        }
        names.sort_by_key(|name| name.end.1);
        spread_out(&mut names, height - AXIS_HEIGHT);
        names.iter().try_for_each(|name| name.draw(area))
    })
}

/// How a line is drawn.
#[derive(Clone, Copy)]
struct Style {
    colour: RGBColor,
    mark: &'static [Pixel],
    /// How many lines of the same colour come before: the second one's marks are hollow, the third one's crosses.
    nth: usize,
}

impl Style {
    fn of(lines: &[Line], index: usize) -> Self {
        let (colour, mark) = look(&lines[index].tool);
        let nth = lines[..index].iter().filter(|line| look(&line.tool).0 == colour).count();
        Self { colour, mark, nth }
    }
}

/// Draws a line and says where it ends.
fn draw_line(area: &Area<'_>, pixel: impl Fn(f64, f64) -> Pixel, line: &Line, style: Style) -> DrawnAs<Option<Pixel>> {
    let middles: Vec<Pixel> = line.points.iter().map(|(along, spread)| pixel(*along, spread.median)).collect();
    area.draw(&PathElement::new(middles.clone(), style.colour.stroke_width(2)))?;
    for (along, spread) in line.points.iter().filter(|(_, spread)| spread.max > spread.min) {
        let whisker = [pixel(*along, spread.min), pixel(*along, spread.max)];
        area.draw(&PathElement::new(whisker.to_vec(), style.colour.stroke_width(1)))?;
    }
    middles.iter().try_for_each(|middle| draw_mark(area, *middle, style))?;
    Ok(middles.last().copied())
}

fn draw_mark(area: &Area<'_>, (x, y): Pixel, Style { colour, mark, nth }: Style) -> Drawn {
    let corners = || mark.iter().map(|(right, down)| (x + right, y + down));
    match nth % 3 {
        0 => area.draw(&Polygon::new(corners().collect::<Vec<_>>(), colour.filled())),
        1 => {
            area.draw(&Polygon::new(corners().collect::<Vec<_>>(), WHITE.filled()))?;
            area.draw(&PathElement::new(corners().chain(corners().take(1)).collect::<Vec<_>>(), colour.stroke_width(2)))
        }
        _ => area.draw(&Cross::new((x, y), 4, colour.stroke_width(2))),
    }
}

/// What is written at the end of a line.
struct Name {
    text: String,
    style: Style,
    /// Where the line ends.
    end: Pixel,
    /// How far down the name is.
    at: i32,
}

impl Name {
    fn draw(&self, area: &Area<'_>) -> Drawn {
        let left = WIDTH as i32 - NAMES_WIDTH;
        let leader = vec![(self.end.0 + 6, self.end.1), (left, self.at), (left + 8, self.at)];
        area.draw(&PathElement::new(leader, self.style.colour.mix(0.5).stroke_width(1)))?;
        draw_mark(area, (left + 14, self.at), self.style)?;
        area.draw(&Text::new(self.text.clone(), (left + 26, self.at), text(HPos::Left)))
    }
}

/// Moves names, which come from top to bottom, so that none lies on another and none below `bottom`.
fn spread_out(names: &mut [Name], bottom: i32) {
    let mut free = TOP + LABEL_GAP / 2;
    for name in names.iter_mut() {
        name.at = name.at.max(free);
        free = name.at + LABEL_GAP;
    }
    let mut free = bottom;
    for name in names.iter_mut().rev() {
        name.at = name.at.min(free);
        free = name.at - LABEL_GAP;
    }
}

/// An axis: how values are placed on it, and where it has ticks.
#[derive(Clone, Debug, PartialEq)]
struct Axis {
    scale: Scale,
    begin: f64,
    end: f64,
    /// Values; ascending.
    ticks: Vec<f64>,
    /// Where a zero is placed on a logarithmic axis.
    zero: Option<f64>,
}

impl Axis {
    fn linear(end: f64) -> Self {
        let about = end / 5.0;
        let step = steps(about).find(|step| *step >= about * EXACT).unwrap_or(about);
        let ticks = (0..).map(|number| f64::from(number) * step).take_while(|tick| *tick * EXACT <= end);
        Self { scale: Scale::Linear, begin: 0.0, end, ticks: ticks.collect(), zero: None }
    }

    /// An axis for these values, none of them below zero.
    fn of(scale: Scale, values: impl Iterator<Item = f64> + Clone) -> Self {
        let greatest = values.clone().fold(0.0, f64::max);
        let least = values.clone().filter(|value| *value > 0.0).fold(f64::INFINITY, f64::min);
        if scale == Scale::Linear || !least.is_finite() {
            return Self::linear(if greatest > 0.0 { greatest * 1.05 } else { 1.0 });
        }
        let mut ticks = ticks_around(least, greatest, steps);
        if ticks.len() > MOST_TICKS {
            ticks = ticks_around(least, greatest, powers);
        }
        let zero = values.clone().any(|value| value <= 0.0).then(|| ticks[0] / 10.0);
        ticks.splice(0..0, zero);
        let (begin, end) = (ticks[0], ticks[ticks.len() - 1]);
        Self { scale, begin, end, ticks, zero }
    }

    /// What a value's distance on the axis goes by.
    fn place(&self, value: f64) -> f64 {
        match (self.scale, self.zero) {
            (Scale::Linear, _) => value,
            (Scale::Logarithmic, Some(zero)) if value <= 0.0 => zero.log10(),
            (Scale::Logarithmic, _) => value.max(f64::MIN_POSITIVE).log10(),
        }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let (begin, end) = (self.place(self.begin), self.place(self.end));
        from + ((self.place(*value) - begin) / (end - begin) * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.begin..self.end
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        if self.zero == Some(*value) { "0".to_owned() } else { number(*value) }
    }
}

/// 1, 2 and 5 times powers of ten, ascending, from the power at or below `from`.
fn steps(from: f64) -> impl Iterator<Item = f64> {
    powers(from).flat_map(|power| [1.0, 2.0, 5.0].map(|factor| factor * power))
}

/// Powers of ten, ascending, from the one at or below `from`.
fn powers(from: f64) -> impl Iterator<Item = f64> {
    let first = (from * EXACT.recip()).log10().floor() as i32;
    (first..).map(|exponent| 10_f64.powi(exponent))
}

/// Those of `ticks` from the last at or below `least` to the first at or above `greatest`; at least two.
fn ticks_around<I: Iterator<Item = f64>>(least: f64, greatest: f64, ticks: fn(f64) -> I) -> Vec<f64> {
    let mut around: Vec<f64> = Vec::new();
    for tick in ticks(least) {
        if tick * EXACT <= least {
            around.clear();
        }
        around.push(tick);
        if tick >= greatest * EXACT && around.len() > 1 {
            break;
        }
    }
    around
}

/// A number with three digits that count, and none that don't.
pub fn number(value: f64) -> String {
    let decimals = match value.abs() {
        0.0 => 0,
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.9995 => 2,
        size => 2 - size.log10().floor() as i32,
    };
    let text = format!("{value:.*}", usize::try_from(decimals).unwrap_or(0).min(9));
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn cut(name: &str) -> String {
    if name.chars().count() <= LONGEST_NAME {
        return name.to_owned();
    }
    name.chars().take(LONGEST_NAME - 1).chain(['…']).collect()
}

fn text(side: HPos) -> TextStyle<'static> {
    (FONT, TEXT_SIZE).into_font().color(&DARK).pos(Pos::new(side, VPos::Center))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type DrawnAs<T> = std::result::Result<T, DrawingAreaErrorKind<std::io::Error>>;
type Drawn = DrawnAs<()>;

fn draw((width, height): (u32, u32), paint: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
    let painted = area.fill(&WHITE).and_then(|()| paint(&area)).and_then(|()| area.present());
    drop(area);
    painted.map_err(|e| Error::new(format!("a chart cannot be drawn: {e}")))?;
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logarithmic(values: &[f64]) -> Axis {
        Axis::of(Scale::Logarithmic, values.iter().copied())
    }

    fn labels(axis: &Axis) -> String {
        axis.ticks.iter().map(|tick| axis.format_ext(tick)).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn ticks_are_at_1_2_and_5_times_powers_of_ten_and_enclose_the_values() {
        assert_eq!(labels(&Axis::of(Scale::Linear, [0.3, 8.0].into_iter())), "0 2 4 6 8");
        assert_eq!(labels(&logarithmic(&[0.3, 8.0])), "0.2 0.5 1 2 5 10");
        assert_eq!(labels(&logarithmic(&[0.1, 1.0])), "0.1 0.2 0.5 1");
        assert_eq!(labels(&logarithmic(&[3.0, 3.0])), "2 5");
        assert_eq!(labels(&logarithmic(&[1.0])), "1 2");
        assert_eq!(labels(&logarithmic(&[0.05, 480_000.0])), "0.01 0.1 1 10 100 1000 10000 100000 1000000");
    }

    #[test]
    fn a_zero_has_a_place_of_its_own_on_a_logarithmic_axis() {
        let axis = logarithmic(&[0.0, 0.1, 10.0]);
        assert_eq!(labels(&axis), "0 0.1 0.2 0.5 1 2 5 10");
        assert_eq!([0.0, 0.1, 10.0].map(|value| axis.map(&value, (0, 300))), [0, 100, 300]);
    }

    #[test]
    fn an_axis_of_nothing_but_zero_can_be_drawn() {
        assert_eq!(logarithmic(&[0.0]).end, 1.0);
        bars(&["s"], &[Bar { name: "x".to_owned(), tool: "cat".to_owned(), values: vec![Some(Spread::one(0.0))] }])
            .unwrap();
    }

    #[test]
    fn numbers_have_three_digits_that_count() {
        let shown = [0.0, 0.004_237, 0.745_1, 1.0, 9.999, 12.34, 99.99, 1608.6].map(number);
        assert_eq!(shown, ["0", "0.00424", "0.745", "1", "10", "12.3", "100", "1609"]);
    }

    #[test]
    fn names_at_the_ends_of_lines_do_not_lie_on_each_other() {
        let style = Style { colour: OTHERS.0, mark: OTHERS.1, nth: 0 };
        let name = |at| Name { text: String::new(), style, end: (0, at), at };
        let mut names = [10, 12, 200, 201, 202].map(name);
        spread_out(&mut names, 210);
        assert_eq!(names.map(|name| name.at), [15, 33, 174, 192, 210]);
    }

    #[test]
    fn a_long_name_is_cut() {
        assert_eq!(cut(&"x".repeat(60)).chars().count(), LONGEST_NAME);
    }
}
