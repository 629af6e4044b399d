//! A chart with two panels over the same x axis: rates above and times below.

use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::combinators::BindKeyPoints;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::common::AnyError;

const SIZE: (u32, u32) = (900, 720);
const FONT: &str = "sans-serif";
/// Distance between two positions, in the integer coordinates of the x axis.
const STEP: i32 = 30;
/// Distinguishable without telling red from green.
const COLORS: [RGBColor; 3] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
];

pub(crate) struct Chart {
    pub(crate) title: String,
    /// Where the figures were measured, in small type.
    pub(crate) note: String,
    /// The title of the x axis, and the label of each position.
    pub(crate) positions: (String, Vec<String>),
    pub(crate) rates: Vec<Line>,
    /// In milliseconds.
    pub(crate) times: Vec<Line>,
}

/// One value per position.
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) values: Vec<f64>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

impl Chart {
    pub(crate) fn draw(&self, path: &Path) -> Result<(), AnyError> {
        let area = SVGBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let area = area.titled(&self.title, (FONT, 21))?;
        let area = area.titled(&self.note, (FONT, 13))?;
        let (above, below) = area.split_vertically((area.dim_in_pixel().1 / 2) as i32);
        let rates = 0.0..greatest(&self.rates) * 1.1;
        self.panel(
            &above,
            "requests a second",
            &self.rates,
            rates,
            SeriesLabelPosition::LowerRight,
        )?;
        let (from, to) = (least(&self.times), greatest(&self.times));
        // Leaves room for the legend above the lines.
        let (from, to) = (from / 1.5, to * (to / from).sqrt().max(3.0));
        let decades = from.log10().floor() as i32..=to.log10().floor() as i32;
        let marks =
            decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|mark| mark * 10_f64.powi(decade)));
        let marks: Vec<f64> = marks.filter(|mark| (from..to).contains(mark)).collect();
        self.panel(
            &below,
            "milliseconds",
            &self.times,
            (from..to).log_scale().with_key_points(marks),
            SeriesLabelPosition::UpperLeft,
        )?;
        area.present()?;
        Ok(())
    }

    fn panel<Y>(
        &self,
        area: &Area<'_>,
        unit: &str,
        lines: &[Line],
        values: Y,
        legend_at: SeriesLabelPosition,
    ) -> Result<(), AnyError>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let (title, labels) = &self.positions;
        let positions: Vec<i32> = (0..labels.len() as i32).map(|index| index * STEP).collect();
        let range = -STEP / 3..positions.last().copied().unwrap_or_default() + STEP / 3;
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(range.with_key_points(positions), values)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.15))
            .x_label_formatter(&|position| labels[(position / STEP) as usize].clone())
            .y_label_formatter(&|value| figure(*value))
            .x_desc(title)
            .y_desc(unit)
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 14))
            .draw()?;
        for (line, color) in lines.iter().zip(COLORS) {
            let points = || {
                (0..)
                    .step_by(STEP as usize)
                    .zip(line.values.iter().copied())
            };
            chart
                .draw_series(LineSeries::new(points(), color.stroke_width(2)))?
                .label(line.name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
                });
            chart.draw_series(points().map(|point| Circle::new(point, 3, color.filled())))?;
        }
        chart
            .configure_series_labels()
            .position(legend_at)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.2))
            .label_font((FONT, 13))
            .draw()?;
        Ok(())
    }
}

/// Formats 12000 as 12,000, and 0.5 as 0.5.
fn figure(value: f64) -> String {
    if value < 1000.0 {
        return format!("{value}");
    }
    let whole = value as u64;
    format!("{},{:03}", whole / 1000, whole % 1000)
}

fn values(lines: &[Line]) -> impl Iterator<Item = f64> {
    lines.iter().flat_map(|line| line.values.iter().copied())
}

fn greatest(lines: &[Line]) -> f64 {
    values(lines).fold(f64::MIN_POSITIVE, f64::max)
}

fn least(lines: &[Line]) -> f64 {
    values(lines).fold(f64::MAX, f64::min)
}
