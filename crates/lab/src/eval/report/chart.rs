//! Line charts as SVG.

use std::path::Path;

use plotters::prelude::*;

/// One line.
pub(super) struct Line {
    pub(super) label: String,
    /// `(x, y)`, by x.
    pub(super) points: Vec<(f64, f64)>,
}

/// Width and height.
const SIZE_PIXELS: (u32, u32) = (760, 420);

/// Of the legend, at the right, where it covers no line.
const LEGEND_PIXELS: u32 = 210;

/// Distance of its lines.
const LEGEND_STEP_PIXELS: i32 = 20;

/// Colours that are told apart without red against green (the first six: Okabe and Ito 2008), as many as a report has lines.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(90, 90, 90),
    RGBColor(0, 0, 0),
    RGBColor(140, 86, 75),
    RGBColor(110, 64, 170),
];

/// Ticks are at least this factor apart, so that their labels do not cover one another.
const TICK_FACTOR: f64 = 1.1;

/// Draws lines over a logarithmic count of tokens. `y` is the range of the other axis.
///
/// # Errors
/// The error of drawing or writing the file, human-readable.
pub(super) fn line_chart(
    path: &Path,
    title: &str,
    y_title: &str,
    y: std::ops::Range<f64>,
    lines: &[Line],
) -> Result<(), String> {
    draw(path, title, y_title, y, lines).map_err(|error| error.to_string())
}

fn draw(
    path: &Path,
    title: &str,
    y_title: &str,
    y: std::ops::Range<f64>,
    lines: &[Line],
) -> Result<(), Box<dyn std::error::Error>> {
    let mut xs: Vec<f64> = lines.iter().flat_map(|line| line.points.iter().map(|point| point.0)).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup_by(|next, kept| *next < *kept * TICK_FACTOR);
    let (first, last) = (xs.first().copied().unwrap_or(1.0), xs.last().copied().unwrap_or(1.0));
    let decimals = match y.end - y.start {
        ..2.0 => 2,
        ..20.0 => 1,
        _ => 0,
    };
    let root = SVGBackend::new(path, SIZE_PIXELS).into_drawing_area();
    root.fill(&WHITE)?;
    let (left, legend) = root.split_horizontally(SIZE_PIXELS.0 - LEGEND_PIXELS);
    let mut chart = ChartBuilder::on(&left)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d((first * 0.9..last * 1.1).log_scale().with_key_points(xs), y)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("tokens")
        .y_desc(y_title)
        .x_label_formatter(&|x| thousands(*x))
        .y_label_formatter(&|y| format!("{y:.decimals$}"))
        .draw()?;
    for (index, (line, colour)) in lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
        // Lines that lie on one another are seen all the same: what is drawn first is wider.
        let style = colour.stroke_width(2 + (lines.len() - 1 - index) as u32);
        chart.draw_series(LineSeries::new(line.points.iter().copied(), style).point_size(3))?;
        let y = 48 + index as i32 * LEGEND_STEP_PIXELS;
        legend.draw(&PathElement::new([(0, y), (16, y)], colour.stroke_width(3)))?;
        legend.draw(&Text::new(line.label.as_str(), (24, y - 5), ("sans-serif", 12)))?;
    }
    root.present()?;
    Ok(())
}

/// A whole number with its thousands apart.
fn thousands(x: f64) -> String {
    let digits = format!("{x:.0}");
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().map(|g| std::str::from_utf8(g).unwrap_or("")).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_name_what_was_measured() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chart.svg");
        let line = |label: &str, y: f64| Line {
            label: label.into(),
            points: vec![(510.0, y), (512.0, y), (32_768.0, y + 1.0)],
        };
        line_chart(&path, "Title", "perplexity", 10.0..20.0, &[line("one", 12.0), line("two", 14.0)]).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        for part in ["Title", "perplexity", "one", "two", "\n510\n", "\n32,768\n", "\n12.0\n"] {
            assert!(svg.contains(part), "{part:?} in {svg}");
        }
        assert!(!svg.contains("\n512\n"), "a label on another: {svg}");
    }
}
